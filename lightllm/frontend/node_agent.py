"""A prefill or decode node's end of its links to the pd_masters.

Dials every master it knows of, for ever, and passes messages between each link and the one engine of this
node: requests, aborts and leases in; reservations and, in one frame per turn of the event loop, outputs out.
Knows nothing of what a request means. A master whose link is lost loses its requests here, too. Runs in the
frontend process of a node.
"""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from lightllm import messages
from lightllm.cluster_link import Dialer, Welcome
from lightllm.cluster_messages import (
    REGISTER_PATH,
    REGISTER_PURPOSE,
    Beat,
    Bye,
    FromNode,
    KVTotals,
    NodeRecord,
    NodeReport,
    Registration,
    ToNode,
)
from lightllm.errors import LightLLMError
from lightllm.frontend.engine_client import EngineClient
from lightllm.messages import (
    AbortRequest,
    EngineOutput,
    EngineRequest,
    EngineStats,
    Inspect,
    Inspected,
    KVReserved,
    RenewLeases,
    RequestFailure,
    RequestOutput,
)
from lightllm.node_link import Dialling, Link

logger = logging.getLogger(__name__)

INSPECT_LIMIT_S = 0.8
ENGINE_CHECK_S = 1.0


class NodeAgent:
    """All master links of this node.

    Args:
        engine: the node's own; its `on_kv_reserved` is taken over.
        address: host:port of this node's HTTP server, for people.

    Attributes:
        is_draining: set when nothing new is taken any more.
        kv_totals: asked what has become of KV transfers, for each heartbeat.
    """

    def __init__(
        self,
        engine: EngineClient,
        token: bytes,
        *,
        node_id: str,
        epoch: int,
        role: str,
        address: str,
        version: str = "",
    ) -> None:
        self.engine = engine
        self.token = token
        self.node_id = node_id
        self.epoch = epoch
        self.role = role
        self.address = address
        self.version = version
        self.is_draining = False
        self.kv_totals: Callable[[], list[KVTotals]] = list
        self._wanted: set[tuple[str, int]] = set()
        self._masters: dict[tuple[str, int], _MasterLink] = {}
        self._fault: str | None = None
        self._watching = asyncio.get_running_loop().create_task(self._watch_engine(), name="engine-watch")
        engine.on_kv_reserved = self._on_kv_reserved

    @property
    def num_live(self) -> int:
        """Requests of all masters that have not ended."""
        return sum(len(master.requests) for master in self._masters.values())

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens of all masters' requests that have brought no token yet."""
        return sum(master.queued_tokens for master in self._masters.values())

    @property
    def is_registered(self) -> bool:
        """Whether at least one master takes this node."""
        return any(master.link is not None for master in self._masters.values())

    def masters(self) -> list[str]:
        """host:port of each."""
        return [f"{host}:{port}" for host, port in self._masters]

    def states(self) -> list[str]:
        """One line for each master."""
        return [f"{m.dialling.host}:{m.dialling.port}: {m.dialling.state}" for m in self._masters.values()]

    def follow(self, masters: set[tuple[str, int]]) -> None:
        """Keep a link to each of these (host, port).

        One that is not listed any more is given up once its link is gone: a config_server that has just
        started may not know of it yet.
        """
        self._wanted = set(masters)
        for address in masters - self._masters.keys():
            self._masters[address] = _MasterLink(self, *address)
        self.prune()

    def prune(self) -> None:
        """Give up masters that are neither wanted nor linked."""
        for address, master in list(self._masters.items()):
            if address not in self._wanted and master.link is None:
                del self._masters[address]
                master.stop("this pd_master is not listed any more")

    def engine_changed(self, how: str) -> None:
        """The engine has gone or come: masters must not count on what they know of it."""
        self._close_links(f"the engine of this node {how}")

    def drain(self) -> None:
        """Tell all masters to send nothing new."""
        self.is_draining = True
        for master in self._masters.values():
            master.report()

    def leave(self, reason: str) -> None:
        """Say good-bye to all masters and dial no more."""
        self._watching.cancel()
        for master in self._masters.values():
            master.send(Bye(reason=reason))
            master.stop(reason)
        self._masters.clear()

    def registration(self) -> Registration:
        """Who we are, for a hello.

        Raises:
            LightLLMError: no engine is up, or it hangs, so there is nothing to offer.
        """
        self.engine.require_up()
        if self._fault is not None:
            raise LightLLMError(self._fault, code="engine_down")
        info = self.engine.info
        assert info is not None
        record = NodeRecord(
            node_id=self.node_id,
            epoch=self.epoch,
            role=self.role,
            address=self.address,
            layout=info.kv_layout,
        )
        return Registration(record=record, info=info, version=self.version)

    async def _watch_engine(self) -> None:
        """An engine that hangs makes the node as good as lost: its masters hear of it by their links' end."""
        while True:
            await asyncio.sleep(ENGINE_CHECK_S)
            fault = await self.engine.find_fault() if self.engine.info is not None else None
            if fault is not None and self._fault is None:
                logger.error("%s: links to pd_masters are closed until it answers", fault)
                self._close_links(fault)
            self._fault = fault

    def _close_links(self, reason: str) -> None:
        for master in self._masters.values():
            if master.link is not None:
                master.link.close(reason)

    def _on_kv_reserved(self, message: KVReserved) -> None:
        for master in self._masters.values():
            if message.request_id in master.requests:
                master.send(message)
                return


class _MasterLink:
    """The link to one master and the requests that came over it."""

    def __init__(self, agent: NodeAgent, host: str, port: int) -> None:
        self.agent = agent
        self.link: Link | None = None
        # Prompt tokens of each request, 0 once its first token is there.
        self.requests: dict[str, int] = {}
        self._outputs: list[RequestOutput] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._decoder: msgspec.msgpack.Decoder[ToNode] = messages.decoder(ToNode)
        self.dialling = Dialling(host, port, REGISTER_PATH, self, self._dialer, "pd_master")

    def stop(self, reason: str) -> None:
        """Close the link; its requests end."""
        self.dialling.stop(reason)

    def send(self, message: FromNode) -> None:
        """Send behind all outputs so far."""
        if self.link is not None:
            self._flush()
            self.link.send(message)

    def report(self) -> None:
        """Send a heartbeat out of turn."""
        if self.link is not None:
            self.link.send(self.heartbeat(self.link))

    # ------------------------------------------------------------ LinkOwner

    def on_open(self, link: Link, welcome: Welcome | None) -> None:
        """Registered."""
        self.link = link
        self.report()

    def on_body(self, link: Link, body: bytes) -> None:
        """A message of the master."""
        match self._decoder.decode(body):
            case EngineRequest() as request:
                self._submit(request)
            case AbortRequest(request_id=request_id, reason=reason):
                if self.requests.pop(request_id, None) is not None:
                    self.agent.engine.abort(request_id, reason)
            case RenewLeases(request_ids=request_ids):
                self.agent.engine.renew_leases([i for i in request_ids if i in self.requests])
            case Inspect() as question:
                task = self._loop.create_task(self._inspect(question))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case Beat():
                pass

    def on_closed(self, link: Link, reason: str) -> None:
        """Nobody waits for these any more."""
        self.link = None
        self._outputs.clear()
        requests, self.requests = self.requests, {}
        if requests:
            logger.warning("link to a pd_master lost (%s): %d requests aborted", reason, len(requests))
        for request_id in requests:
            self.agent.engine.abort(request_id)
        self._loop.call_soon(self.agent.prune)

    def heartbeat(self, link: Link) -> NodeReport:
        """How this node is doing."""
        return NodeReport(
            stats=self.agent.engine.stats,
            queued_prompt_tokens=self.agent.num_queued_tokens,
            is_draining=self.agent.is_draining or self.agent.engine.info is None,
            kv_totals=self.agent.kv_totals(),
        )

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of requests that have brought no token yet."""
        return sum(self.requests.values())

    # ------------------------------------------------------------ OutputSink

    def on_output(self, output: RequestOutput) -> None:
        """Take one output of a step; all of one turn of the loop leave in one frame."""
        if output.finish_reason is not None:
            self.requests.pop(output.request_id, None)
        elif self.requests.get(output.request_id) and output.new_token_ids:
            self.requests[output.request_id] = 0
        if not self._outputs:
            self._loop.call_soon(self._flush)
        self._outputs.append(output)

    def _submit(self, request: EngineRequest) -> None:
        self.requests[request.request_id] = len(request.prompt_token_ids)
        try:
            if self.agent.is_draining:
                raise LightLLMError("the node is draining", code="draining")
            self.agent.engine.submit(request, self)
        except LightLLMError as error:
            failure = RequestFailure(code=error.code, message=error.message)
            self.on_output(RequestOutput(request_id=request.request_id, finish_reason="error", error=failure))

    async def _inspect(self, question: Inspect) -> None:
        """Answer for the engine; that it does not answer itself is worth knowing, too."""
        views = await self.agent.engine.inspect(question.request_ids, INSPECT_LIMIT_S)
        fault = "" if views is not None else f"its engine does not answer within {INSPECT_LIMIT_S:g} s"
        self.send(Inspected(nonce=question.nonce, views=views or [], fault=fault))

    def _flush(self) -> None:
        if self._outputs and self.link is not None:
            outputs, self._outputs = self._outputs, []
            self._send_outputs(self.link, outputs)

    def _send_outputs(self, link: Link, outputs: list[RequestOutput]) -> None:
        """Send in as many frames as it takes; one output that is too large alone ends in an error."""
        try:
            link.send(EngineOutput(outputs=outputs, stats=EngineStats()))
        except ValueError as error:
            if len(outputs) > 1:
                half = len(outputs) // 2
                self._send_outputs(link, outputs[:half])
                self._send_outputs(link, outputs[half:])
                return
            request_id = outputs[0].request_id
            if self.requests.pop(request_id, None) is not None:
                self.agent.engine.abort(request_id)
            text = f"the answer is too large for the link to the pd_master ({error}); ask for fewer logprobs"
            failure = RequestFailure(code="internal", message=text)
            self._send_outputs(
                link, [RequestOutput(request_id=request_id, finish_reason="error", error=failure)]
            )

    def _dialer(self) -> Dialer:
        agent = self.agent
        try:
            detail = messages.encode(agent.registration())
        except LightLLMError as error:
            # Not an error of the link; it is tried again like one.
            raise TimeoutError(error.message) from error
        return Dialer(agent.token, REGISTER_PURPOSE, agent.node_id, agent.epoch, detail)
