"""The records of the router: a request on its way through a cluster, and its legs on the nodes.

Plain state, changed by `pd_router` only. Runs in the frontend's event loop of a pd_master.
"""

import secrets
import time
from collections import OrderedDict
from typing import Any

import msgspec

from lightllm.frontend.engine_client import OutputSink
from lightllm.frontend.node_directory import Node
from lightllm.messages import EngineRequest, KVSource, KVTarget, RequestFailure, RequestOutput

KEPT_HISTORIES = 1000


class Leg:
    """What one node does for a request.

    Attributes:
        kind: p = computes the prompt and ships its KV, d = receives that and decodes, s = all by itself.
        num_tokens: what was promised of the node's KV.
        num_cached_tokens: of a prompt that it receives, so many were there.
        has_output: a token has come from it.
        sink: the request's, once its tokens go straight there and nothing else hangs on them; None before.
        tokens: the request's.
    """

    __slots__ = (
        *("events", "has_output", "kind", "leg_id", "node", "num_cached_tokens"),
        *("num_tokens", "routed", "sink", "state", "tokens"),
    )

    def __init__(self, leg_id: str, routed: "RoutedRequest", node: Node, kind: str, num_tokens: int) -> None:
        self.leg_id = leg_id
        self.routed = routed
        self.node = node
        self.kind = kind
        self.num_tokens = num_tokens
        self.num_cached_tokens = 0
        self.has_output = False
        self.sink: OutputSink | None = None
        self.tokens = routed.tokens
        self.state = "new"
        self.events: list[list[Any]] = []
        routed.legs.append(self)

    def note(self, event: str) -> None:
        """Something has happened to it."""
        self.state = event
        self.events.append([event, round(time.time(), 3)])
        self.routed.moved_s = time.monotonic()

    def describe(self) -> dict[str, Any]:
        """The published form."""
        found = {
            "node": self.node.node_id,
            "role": self.node.record.role,
            "leg": self.leg_id,
            "state": self.state,
            "events": self.events,
        }
        return found if self.kind != "d" else {**found, "cached_tokens": self.num_cached_tokens}


class RoutedRequest:
    """One request while the cluster works at it.

    Attributes:
        request: as it came, with its final seed.
        tokens: what the client has got; another node goes on behind them.
        prefill, decode: the live legs.
        chosen_prefill: node that computes the prompt, at once or when slots are reserved.
        booked_tokens: what of its queue is ours.
        is_reserved: the decode node has slots for what the prefill node computes.
        early: outputs of the prefill leg that came before that; no client hears of a request without slots.
        has_first: the tokens of the decode leg may be passed on: the first one has come, or is its own.
        held: outputs of the decode leg that came too early.
        is_solo: no transfer any more; one node does it all.
        is_pinned: it tries one pair, and goes nowhere else.
        avoid: nodes that failed it since it last waited.
        wait_until_s: monotonic end of its waiting for a node, 0 while it does not wait.
    """

    __slots__ = (
        "_events",
        "_seen_tokens",
        "_was_reported",
        "avoid",
        "booked_tokens",
        "chosen_prefill",
        "decode",
        "early",
        "has_first",
        "has_shared_prompt",
        "held",
        "is_new",
        "is_pinned",
        "is_reserved",
        "is_solo",
        "last_failure",
        "legs",
        "moved_s",
        "num_attempts",
        "num_legs",
        "prefill",
        "request",
        "sink",
        "ticket",
        "tokens",
        "wait_until_s",
    )

    def __init__(self, request: EngineRequest, sink: OutputSink) -> None:
        self.request = request
        self.sink = sink
        self.tokens: list[int] = list(request.output_token_ids)
        self.legs: list[Leg] = []
        self.prefill: Leg | None = None
        self.decode: Leg | None = None
        self.chosen_prefill: Node | None = None
        self.booked_tokens = 0
        self.ticket = ""
        self.is_reserved = False
        self.early: list[RequestOutput] = []
        self.has_first = False
        self.held: list[RequestOutput] = []
        self.is_new = True
        self.has_shared_prompt = False
        self.is_solo = False
        self.is_pinned = False
        self.avoid: set[str] = set()
        self.wait_until_s = 0.0
        self.num_legs = 0
        self.num_attempts = 0
        self.last_failure: RequestFailure | None = None
        self.moved_s = time.monotonic()
        self._events: list[list[Any]] = []
        self._seen_tokens = 0
        self._was_reported = False

    def resumed(self, leg_id: str) -> EngineRequest:
        """For a node that does all by itself, from where the client's text ends."""
        return self._leg(leg_id, output_token_ids=list(self.tokens), is_first=not self.tokens)

    def for_decode(self, leg_id: str, prefill: Node) -> EngineRequest:
        """For the node that gets the KV of the prompt from `prefill`, under this request's ticket."""
        source = KVSource(node_id=prefill.node_id, epoch=prefill.info.kv_epoch, ticket=self.ticket)
        return self._leg(leg_id, recv_kv_from=source, is_first=False)

    def for_prefill(self, leg_id: str, decode: Node) -> EngineRequest:
        """For the node that computes the prompt; its KV goes to `decode`, which has slots for it or will."""
        target = KVTarget(
            node_id=decode.node_id,
            epoch=decode.info.kv_epoch,
            address=decode.info.kv_address,
            ticket=self.ticket,
        )
        return self._leg(leg_id, send_kv_to=target)

    def _leg(self, leg_id: str, *, is_first: bool = True, **fields: Any) -> EngineRequest:
        """`is_first`: its first token is the request's first, with which the prompt's logprobs come."""
        params = self.request.sampling_params
        if not is_first and params.prompt_logprobs is not None:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        return msgspec.structs.replace(self.request, request_id=leg_id, sampling_params=params, **fields)

    def note(self, event: str) -> None:
        """Something has happened to it on the master."""
        self._events.append([event, round(time.time(), 3)])
        self.moved_s = time.monotonic()

    def wait_from(self, now: float, limit_s: float) -> None:
        """It has to wait for a node, at most so long from the first time on."""
        if not self.wait_until_s:
            self.wait_until_s = now + limit_s
            self.note("waits for a node")

    def book(self, prefill: Node) -> None:
        """That node is to compute the prompt; known at once, so that those that come together are spread."""
        self.chosen_prefill, self.ticket = prefill, secrets.token_hex(16)
        self.booked_tokens = len(self.request.prompt_token_ids)
        prefill.queued_tokens += self.booked_tokens

    def unbook(self) -> None:
        """Its prompt is no longer in the queue of the node that was to compute it."""
        if self.chosen_prefill is not None:
            self.chosen_prefill.queued_tokens -= self.booked_tokens
        self.booked_tokens = 0

    def forget_attempt(self) -> None:
        """Its legs have ended; whatever comes next begins anew behind the client's tokens."""
        self.unbook()
        self.chosen_prefill = None
        self.is_reserved = self.has_first = False
        self.early.clear()
        self.held.clear()

    def describe(self) -> list[dict[str, Any]]:
        """One entry for the master, one for each leg."""
        own = {"node": "pd_master", "role": "pd_master", "state": self._state(), "events": list(self._events)}
        return [own, *(leg.describe() for leg in self.legs)]

    def is_stuck(self, now: float, limit_s: float) -> bool:
        """Whether nothing has happened for so long; said once, until something happens again."""
        if len(self.tokens) != self._seen_tokens:
            self._seen_tokens, self.moved_s, self._was_reported = len(self.tokens), now, False
        if now - self.moved_s <= limit_s or self._was_reported:
            return False
        self._was_reported = True
        return True

    def _state(self) -> str:
        if self.decode is None and self.prefill is None:
            return "waiting"
        return "decoding" if self.tokens else "prefilling"


class Legs(dict[str, Leg]):
    """All live legs by id, and what they take of their nodes."""

    def new(self, routed: RoutedRequest, node: Node, kind: str) -> Leg:
        """Give a node something to do for a request."""
        routed.num_legs += 1
        request = routed.request
        num_tokens = len(request.prompt_token_ids) + request.sampling_params.max_new_tokens
        leg = Leg(f"{request.request_id}#{routed.num_legs}{kind}", routed, node, kind, num_tokens)
        self[leg.leg_id] = leg
        node.legs.add(leg.leg_id)
        node.promised_tokens += num_tokens
        return leg

    def drop(self, leg: Leg) -> None:
        """The node has nothing to do with it any more; nothing happens if that was known."""
        routed = leg.routed
        if self.pop(leg.leg_id, None) is None:
            return
        leg.node.legs.discard(leg.leg_id)
        leg.node.promised_tokens -= leg.num_tokens
        if routed.prefill is leg:
            routed.prefill = None
        if routed.decode is leg:
            routed.decode = None


class Histories:
    """What became of the last KEPT_HISTORIES requests, for `/debug/requests`."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()

    def add(self, routed: RoutedRequest) -> None:
        """Keep a request that has ended."""
        self._by_id[routed.request.request_id] = routed.describe()
        if len(self._by_id) > KEPT_HISTORIES:
            self._by_id.popitem(last=False)

    def find(self, request_id: str) -> list[dict[str, Any]]:
        """The entries of a request, or of all its samples."""
        if request_id in self._by_id:
            return list(self._by_id[request_id])
        samples = f"{request_id}/"
        return [x for key, entries in self._by_id.items() if key.startswith(samples) for x in entries]
