"""The engine client of a pd_master: sends each request to a prefill and a decode node, and joins the outputs.

Nothing above it knows that there are several nodes. It owns the legs of every request: asks a decode node for
slots, has a prefill node compute the prompt and ship its KV there, passes the first token on from the one and
the rest from the other, and when a node or a transfer fails sends what the client already has to another
node. Links are `node_server`'s, nodes `node_directory`'s. Runs in the frontend's event loop; no task and no
queue per token.
"""

import asyncio
import logging
import random
import time
from collections import deque
from typing import Any

import msgspec

from lightllm.cluster_messages import NodeReport
from lightllm.errors import CapacityError
from lightllm.frontend.engine_client import FinishRate, OutputSink, hand_over
from lightllm.frontend.node_directory import RETRY_S, Node, NodeDirectory
from lightllm.frontend.pd_inspector import Inspector
from lightllm.frontend.pd_probe import PairProbes
from lightllm.frontend.pd_request import Histories, Leg, Legs, RoutedRequest
from lightllm.messages import (
    AbortRequest,
    EngineInfo,
    EngineRequest,
    EngineStats,
    KVReserved,
    RenewLeases,
    RequestFailure,
    RequestOutput,
)

logger = logging.getLogger(__name__)

LEASE_RENEWAL_S = 5.0
NODE_WAIT_S = 10.0
PUMP_S = 0.25
FULL_RETRY_S = 0.5
MAX_ATTEMPTS = 6
# Ends of a leg that another request would meet at this node, too.
NODE_FAULTS = frozenset(("engine_down", "draining", "loading", "queue_full"))
# All that say something about the node or the transfer, not about the request.
ELSEWHERE = frozenset((*NODE_FAULTS, "node_lost", "kv_transfer_failed", "lease_expired", "kv_full"))


class PDRouter:
    """All requests of this pd_master.

    Args:
        vocab_size: of the model that the master tokenizes for.
        max_queued_requests: how many may wait for a node.

    Attributes:
        directory: the registered nodes; `probes`, which of them can reach each other.
        failovers: legs that were sent again elsewhere, by reason.
    """

    restarts_total = 0

    def __init__(self, *, vocab_size: int, max_queued_requests: int) -> None:
        self.directory = NodeDirectory()
        self.probes = PairProbes(self, vocab_size)
        self.failovers: dict[str, int] = {}
        self._vocab_size = vocab_size
        self._max_queued = max_queued_requests
        self._requests: dict[str, RoutedRequest] = {}
        self._legs = Legs()
        self._waiting: deque[RoutedRequest] = deque()
        self._siblings: dict[str, list[RoutedRequest]] = {}
        self._histories = Histories()
        self.inspector = Inspector(self.directory)
        self._rate = FinishRate()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to renew leases and to look after those that wait; call from the running event loop."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._renew_leases()), loop.create_task(self._look_after())]

    def close(self) -> None:
        """End every live request in an error."""
        for task in self._tasks:
            task.cancel()
        for request in list(self._requests.values()):
            self._fail(request, "engine_down", "the server is stopping")

    # ------------------------------------------------------------ EngineClientLike

    @property
    def info(self) -> EngineInfo | None:
        """What the cluster offers; None while no decode node is there, nor expected back."""
        return self.directory.offer(self._vocab_size)

    @property
    def stats(self) -> EngineStats:
        """Sums over the decode nodes, whose KV is what bounds the cluster."""
        num_waiting = len(self._waiting) + sum(map(len, self._siblings.values()))
        return msgspec.structs.replace(
            self.directory.stats(),
            requests_running=len(self._requests) - num_waiting,
            requests_waiting=num_waiting,
        )

    @property
    def num_live(self) -> int:
        """Requests whose last output has not come yet."""
        return len(self._requests)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a node."""
        return len(self._waiting)

    def require_up(self) -> None:
        """Raise the 503 error that says why nothing can be submitted now; decode nodes do without a P."""
        if self.info is None:
            self.directory.require("decode")

    def require_pair(self) -> None:
        """Raise the 503 error that says which role is missing, or that no KV moves between them."""
        for role in ("decode", "prefill"):
            self.directory.require(role)
        if not self.probes.is_any_ready:
            message = f"no prefill node has reached a decode node: {self.probes.why_none()}"
            raise CapacityError(message, code="no_nodes", retry_after_s=RETRY_S)

    def submit(self, request: EngineRequest, sink: OutputSink) -> None:
        """Route a request; `sink` gets its outputs until one with a finish_reason.

        Raises:
            LightLLMError: no node is there, or too many requests wait for one.
        """
        self.require_up()
        params = request.sampling_params
        if params.seed is None:
            # Both nodes, and whoever goes on after a failure, must draw the same noise.
            params = msgspec.structs.replace(params, seed=random.getrandbits(63))
        after = request.after_request_id
        request = msgspec.structs.replace(request, sampling_params=params, after_request_id=None)
        routed = RoutedRequest(request, sink)
        self._requests[request.request_id] = routed
        if after is not None and after in self._requests and not self._requests[after].has_shared_prompt:
            self._siblings.setdefault(after, []).append(routed)
            routed.note("waits for its sibling's prompt")
        elif len(self._waiting) >= max(1, self._max_queued):
            message = f"{len(self._waiting)} requests wait for a node; the limit is {self._max_queued}"
            self._fail(routed, "queue_full", message)
        else:
            self._route(routed)

    def submit_to(self, request: EngineRequest, sink: OutputSink, prefill: Node, decode: Node) -> None:
        """Send a request through one pair; when that fails, so does the request."""
        routed = RoutedRequest(request, sink)
        routed.is_pinned = True
        self._requests[request.request_id] = routed
        self._reserve(routed, prefill, decode)

    def abort(self, request_id: str, reason: str = "abort") -> None:
        """Stop a request on all its nodes and forget its sink; an unknown id is not an error."""
        routed = self._requests.get(request_id)
        if routed is not None:
            routed.note(f"aborted: {reason}")
            self._rate.add()
            self._end(routed, reason)

    def retry_after_s(self) -> int:
        """Seconds after which a queue that is full now should have room, 1..60."""
        return self._rate.wait_s(max(1, len(self._waiting)))

    async def refresh(self, limit_s: float) -> None:
        """Nodes report by themselves."""
        return

    async def find_fault(self) -> str | None:
        """The master's own loop answers, so it is well."""
        return None

    # ------------------------------------------------------------ nodes

    def node_joined(self, node: Node) -> None:
        """A node has registered."""
        logger.info("%s has joined (%s)", node.node_id, node.record.address)
        self.directory.add(node)
        self.probes.node_joined(node)
        self._pump()

    def node_lost(self, node: Node, reason: str) -> None:
        """A node's link is gone, and all its legs with it."""
        if not self.directory.remove(node):
            return
        logger.warning("%s has gone (%s); it held %d requests", node.node_id, reason, len(node.legs))
        self.probes.node_lost(node)
        for leg_id in list(node.legs):
            leg = self._legs.get(leg_id)
            if leg is not None:
                self._leg_failed(leg, "node_lost", f"{node.node_id} was lost: {reason}")

    def node_reported(self, node: Node, report: NodeReport) -> None:
        """A heartbeat of a node."""
        node.stats = report.stats
        node.reported_queue_tokens = report.queued_prompt_tokens
        if report.is_draining and not node.is_draining:
            logger.info("%s drains: it gets no new requests", node.node_id)
        node.is_draining = report.is_draining

    # ------------------------------------------------------------ from a request to its legs

    def _route(self, routed: RoutedRequest) -> None:
        """Send a request to nodes, or let it wait for one."""
        request = routed.request
        num_tokens = len(request.prompt_token_ids) + request.sampling_params.max_new_tokens
        is_one_token = request.sampling_params.max_new_tokens == 1
        decode = self.directory.pick_decode(num_tokens, routed.avoid)
        if decode is None and not is_one_token:
            self._wait(routed)  # the prompt is not looked up in caches each time that nobody has room
            return
        prefill = None
        if not routed.tokens and not routed.is_solo:
            avoid = routed.avoid | self.probes.cut_off()
            prefill = self.directory.pick_prefill(request.prompt_token_ids, num_tokens, avoid)
        if prefill is not None and is_one_token:
            self._send_whole(routed, prefill)  # the first token is the last: nothing to decode elsewhere
            return
        reachable = None
        if prefill is not None:
            unreachable = self.probes.failed_with(prefill)
            reachable = self.directory.pick_decode(num_tokens, routed.avoid | unreachable)
        if prefill is not None and reachable is not None:
            self._reserve(routed, prefill, reachable)
        elif decode is not None:
            self._send_whole(routed, decode)
        else:
            self._wait(routed)

    def _wait(self, routed: RoutedRequest) -> None:
        routed.wait_from(time.monotonic(), NODE_WAIT_S)
        self._waiting.append(routed)

    def _send_whole(self, routed: RoutedRequest, node: Node) -> None:
        """One node does it all, from what the client already has."""
        leg = self._legs.new(routed, node, "s")
        routed.decode, routed.has_first = leg, True
        self._send(leg, routed.resumed(leg.leg_id))

    def _reserve(self, routed: RoutedRequest, prefill: Node, decode: Node) -> None:
        """Ask the decode node for slots, and have the prompt computed.

        The prefill node need not wait for the answer where there is room by all that is known here: no KV
        leaves it before there are slots. Else it hears of the request once there are some.
        """
        leg = self._legs.new(routed, decode, "d")
        routed.decode = leg
        routed.book(prefill)
        if decode.free_tokens >= 0:
            self._prefill(routed, prefill, decode)
        self._send(leg, routed.for_decode(leg.leg_id, prefill))

    def _prefill(self, routed: RoutedRequest, prefill: Node, decode: Node) -> None:
        leg = routed.prefill = self._legs.new(routed, prefill, "p")
        self._send(leg, routed.for_prefill(leg.leg_id, decode))
        prefill.prefixes.insert(routed.request.prompt_token_ids)

    def on_reserved(self, node: Node, message: KVReserved) -> None:
        """The decode node has slots: the prompt is computed now, or its first token may be passed on."""
        leg = self._legs.get(message.request_id)
        if leg is None or leg.node is not node:
            return
        routed, prefill = leg.routed, leg.routed.chosen_prefill
        if routed.decode is not leg or routed.is_reserved or prefill is None:
            return
        leg.note("reserved")
        leg.num_cached_tokens = message.num_cached_tokens
        routed.wait_until_s, routed.is_reserved = 0.0, True
        if routed.prefill is not None:
            early, routed.early = routed.early, []
            self.on_outputs(routed.prefill.node, early)
        elif self.directory.get(prefill.node_id) is prefill:
            self._prefill(routed, prefill, node)
        else:
            self._abort_leg(leg)
            routed.forget_attempt()
            self._route(routed)

    def _send(self, leg: Leg, request: EngineRequest) -> None:
        leg.note("sent")
        leg.node.send(request)

    # ------------------------------------------------------------ from the nodes to the client

    def on_outputs(self, node: Node, outputs: list[RequestOutput]) -> None:
        """All outputs of a node's step, written to the clients' transports before this returns."""
        legs = self._legs
        for output in outputs:
            leg = legs.get(output.request_id)
            if leg is None or leg.node is not node:
                continue  # it was aborted in the meantime
            sink = leg.sink
            if sink is not None and output.finish_reason is None:
                leg.tokens += output.new_token_ids
                if not hand_over(sink, output):
                    self._fail_internally(leg.routed)
            else:
                self._take(leg, output)

    def _take(self, leg: Leg, output: RequestOutput) -> None:
        routed = leg.routed
        if leg is routed.prefill and not routed.is_reserved and output.error is None:
            routed.early.append(output)
        elif output.finish_reason is not None:
            self._last_output(leg, output)
        elif routed.decode is leg:
            self._decoded(leg, output)
        else:
            self._prefilled(leg, output)

    def _decoded(self, leg: Leg, output: RequestOutput) -> None:
        routed = leg.routed
        leg.has_output = True
        if routed.has_first:
            routed.tokens += output.new_token_ids
            self._deliver(routed, output)
            if routed.is_new:
                self._first_decoded(routed)
            leg.sink = routed.sink
        else:
            routed.held.append(output)

    def _first_decoded(self, routed: RoutedRequest) -> None:
        """The decode node has the prompt: siblings may share it."""
        routed.is_new, routed.has_shared_prompt = False, True
        routed.wait_until_s = 0.0
        for sibling in self._siblings.pop(routed.request.request_id, ()):
            if sibling.request.request_id in self._requests:
                self._route(sibling)

    def _prefilled(self, leg: Leg, output: RequestOutput) -> None:
        """The first token comes from the prefill node; what the decode node said earlier comes behind it."""
        routed = leg.routed
        if not output.new_token_ids:
            return
        routed.unbook()
        leg.has_output = True
        leg.note("first token")
        routed.has_first = True
        routed.tokens += output.new_token_ids
        self._deliver(routed, output)
        held, routed.held = routed.held, []
        for later in held:
            if routed.decode is not None and later.request_id == routed.decode.leg_id:
                self._take(routed.decode, later)

    def _last_output(self, leg: Leg, output: RequestOutput) -> None:
        routed, error = leg.routed, output.error
        if error is not None:
            if error.code in ELSEWHERE:
                self._leg_failed(leg, error.code, error.message)
            else:
                leg.note(f"failed: {error.code}")
                self._fail(routed, error.code, error.message)
            return
        if output.finish_reason == "handed_over":
            leg.note("handed over")
            if output.new_token_ids:
                plain = msgspec.structs.replace(output, finish_reason=None)
                self._prefilled(leg, plain)
            self._legs.drop(leg)
            return
        if routed.decode is leg and not routed.has_first:
            routed.held.append(output)
            return
        leg.note(f"finished: {output.finish_reason}")
        self._legs.drop(leg)
        self._rate.add()
        routed.tokens += output.new_token_ids
        self._end(routed, "abort")
        hand_over(routed.sink, output)

    def _deliver(self, routed: RoutedRequest, output: RequestOutput) -> None:
        if not hand_over(routed.sink, output):
            self._fail_internally(routed)

    def _fail_internally(self, routed: RoutedRequest) -> None:
        self._fail(routed, "internal", "the answer could not be processed")

    # ------------------------------------------------------------ when something fails

    def _leg_failed(self, leg: Leg, code: str, message: str) -> None:
        """Go on without this leg: elsewhere, or not at all after too many attempts."""
        routed = leg.routed
        leg.note(f"failed: {code}")
        leg.node.last_error = message
        is_decode = routed.decode is leg
        self._legs.drop(leg)
        if not is_decode and routed.decode is not None and routed.decode.has_output and routed.has_first:
            return  # all KV has arrived, and the decode node goes on by itself
        other = routed.prefill if is_decode else routed.decode
        if other is not None:
            self._abort_leg(other)
        routed.forget_attempt()
        routed.last_failure = RequestFailure(code=code, message=message)
        if routed.is_pinned:
            self._fail(routed, code, message)
            return
        if code == "kv_full":
            leg.node.full_until_s = time.monotonic() + FULL_RETRY_S
            routed.wait_from(time.monotonic(), NODE_WAIT_S)
        else:
            self.failovers[code] = self.failovers.get(code, 0) + 1
            routed.num_attempts += 1
            if code in NODE_FAULTS:
                routed.avoid.add(leg.node.node_id)
            # A transfer that failed may fail again: the decode node computes the prompt itself.
            routed.is_solo = routed.is_solo or code in ("kv_transfer_failed", "lease_expired")
            logger.warning("request %s: %s", routed.request.request_id, message)
        if routed.num_attempts >= MAX_ATTEMPTS:
            self._fail(routed, code, f"{message} (attempt {routed.num_attempts}, the last one)")
        else:
            self._route(routed)

    def _abort_leg(self, leg: Leg, reason: str = "abort") -> None:
        leg.node.send(AbortRequest(request_id=leg.leg_id, reason=reason))
        leg.note("aborted")
        self._legs.drop(leg)

    def _end(self, routed: RoutedRequest, reason: str) -> None:
        """Forget a request; whatever of it still runs is aborted."""
        request_id = routed.request.request_id
        if self._requests.pop(request_id, None) is None:
            return
        routed.unbook()
        for leg in (routed.prefill, routed.decode):
            if leg is not None:
                self._abort_leg(leg, reason)
        self._histories.add(routed)
        self._first_decoded(routed)

    def _fail(self, routed: RoutedRequest, code: str, message: str) -> None:
        request_id = routed.request.request_id
        self._end(routed, "abort")
        failure = RequestFailure(code=code, message=message)
        hand_over(routed.sink, RequestOutput(request_id=request_id, finish_reason="error", error=failure))

    # ------------------------------------------------------------ what time brings

    def _pump(self) -> None:
        """Try those that wait once more, the oldest first; end those that have waited too long."""
        waiting, self._waiting = self._waiting, deque()
        now = time.monotonic()
        while waiting:
            routed = waiting.popleft()
            if routed.request.request_id not in self._requests:
                continue
            routed.avoid.clear()
            if routed.wait_until_s <= now:
                self._give_up(routed)
            else:
                self._route(routed)

    def _give_up(self, routed: RoutedRequest) -> None:
        waited = f"within {NODE_WAIT_S:.0f} s"
        if self.directory.of_role("decode"):
            message = f"no decode node had room for the request {waited}"
            self._fail(routed, "queue_full", message)
        elif routed.num_legs:
            last = routed.last_failure.message if routed.last_failure is not None else "its node was lost"
            self._fail(routed, "node_lost", f"{last}; no other node came {waited}")
        else:
            self._fail(routed, "no_nodes", f"no decode node came {waited}")

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(PUMP_S)
            self._pump()
            self.inspector.report_stuck(self._requests.values())

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_RENEWAL_S)
            for node in self.directory.all():
                if node.legs:
                    node.send(RenewLeases(request_ids=sorted(node.legs)))

    # ------------------------------------------------------------ for people

    def describe(self, request_id: str) -> list[dict[str, Any]]:
        """Every leg of a request and of its samples, with the times of what happened to it."""
        samples = f"{request_id}/"
        found = self._histories.find(request_id)
        for sample_id, routed in self._requests.items():
            if sample_id == request_id or sample_id.startswith(samples):
                found += routed.describe()
        return found
