"""The frontend's end of the engine link: requests out, each step's outputs to the sinks that wait for them.

One `EngineClient` outlives engines: every restart is a new epoch at a new address. Outputs are delivered by
plain calls from one reader task, without a queue or a wake-up per token. Runs in the frontend's event loop;
knows nothing of text or HTTP.
"""

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from lightllm import messages
from lightllm.errors import CapacityError, LightLLMError, WorkerDied
from lightllm.messages import (
    AbortAll,
    AbortRequest,
    EngineDown,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    EngineUp,
    FromEngine,
    Inspect,
    Inspected,
    KVReserved,
    KVTransfer,
    Ping,
    Pong,
    RenewLeases,
    RequestFailure,
    RequestOutput,
    RequestView,
    ToEngine,
)

logger = logging.getLogger(__name__)

HEARD_LIMIT_S = 5.0
PING_LIMIT_S = 5.0
# A busy engine that was silent for HEARD_LIMIT_S gets this much longer, or what two of its steps take.
BUSY_PING_LIMIT_S = 1.0
RESTART_RETRY_S = 5
LOADING_RETRY_S = 5
MAX_RETRY_S = 60
RATE_WINDOW = 64
MAX_MESSAGES_PER_TURN = 8


class OutputSink(Protocol):
    """Where the outputs of one request go."""

    def on_output(self, output: RequestOutput) -> None:
        """Take the output of a step; called from the event loop, must not block."""
        ...


class EngineClientLike(Protocol):
    """What the frontend needs of whatever generates: the local engine, or a cluster behind a router."""

    @property
    def info(self) -> EngineInfo | None: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def num_live(self) -> int: ...

    @property
    def restarts_total(self) -> int: ...

    def require_up(self) -> None:
        """Raise the 503 error that says why nothing can be submitted now."""
        ...

    def submit(self, request: EngineRequest, sink: OutputSink) -> None:
        """Send a request; `sink` gets its outputs until one with a finish_reason."""
        ...

    def abort(self, request_id: str, reason: str = "abort") -> None:
        """Stop a request and forget its sink; an unknown id is not an error."""
        ...

    def retry_after_s(self) -> int:
        """Seconds after which a queue that is full now should have room, 1..60."""
        ...

    async def refresh(self, limit_s: float) -> None:
        """Bring `stats` up to date if that takes at most `limit_s`."""
        ...

    async def find_fault(self) -> str | None:
        """Name the part that is stuck; None when all is well."""
        ...


class _Live:
    """One request whose outputs are awaited."""

    __slots__ = ("has_output", "num_prompt_tokens", "sink")

    def __init__(self, sink: OutputSink, num_prompt_tokens: int) -> None:
        self.sink = sink
        self.num_prompt_tokens = num_prompt_tokens
        self.has_output = False


class FinishRate:
    """How many requests end per second, from the last few that did."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=RATE_WINDOW)

    def add(self) -> None:
        """Count one that ended now."""
        self._times.append(time.monotonic())

    def wait_s(self, num_waiting: int) -> int:
        """Whole seconds until `num_waiting` requests are done, 1..60."""
        if len(self._times) < 2:
            return 1
        span_s = max(time.monotonic() - self._times[0], 1e-3)
        return max(1, min(MAX_RETRY_S, math.ceil(num_waiting * span_s / len(self._times))))


class EngineClient:
    """The link to the one engine of this node.

    Args:
        on_stats: called with the engine's state after each step.
        max_step_tokens: what the engine computes in one step, at most.

    Attributes:
        info: the engine that is up, None while there is none.
        stats: its state after the last step heard of.
        restarts_total: how many engines came after the first.
        on_kv_reserved: told when a request has slots for KV from another node.
        on_kv_transfers: told of transfers that have ended.
    """

    def __init__(
        self, on_stats: Callable[[EngineStats], None] | None = None, *, max_step_tokens: int = 2**31
    ) -> None:
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.restarts_total = -1
        self.on_kv_reserved: Callable[[KVReserved], None] = lambda message: None
        self.on_kv_transfers: Callable[[list[KVTransfer]], None] = lambda transfers: None
        self._on_stats = on_stats or (lambda stats: None)
        self._max_step_tokens = max_step_tokens
        self._context = zmq.Context(io_threads=1)
        self._push: zmq.Socket[bytes] | None = None
        self._pull: zmq.asyncio.Socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._epoch = -1
        self._down_reason = ""
        self._live: dict[str, _Live] = {}
        self._pongs: dict[int, asyncio.Future[None]] = {}
        self._inspections: dict[int, asyncio.Future[list[RequestView]]] = {}
        self._nonce = 0
        self._heard_s = 0.0
        self._token_s = 0.0
        self._step_s = 0.0
        self._rate = FinishRate()

    @property
    def num_live(self) -> int:
        """Requests whose last output has not come yet."""
        return len(self._live)

    def connect(self, up: EngineUp) -> None:
        """Join a new engine; call from the running event loop."""
        self._close_push()
        self._fail_all("engine_down", "the engine was replaced")
        self._listen(up.reply_address)
        self._push = self._socket(zmq.PUSH)
        self._push.connect(up.address)
        self._epoch, self.info = up.epoch, up.info
        self.stats = EngineStats(kv_total_tokens=up.info.kv_total_tokens)
        self.restarts_total += 1
        self._heard_s = time.monotonic()
        self._send(AbortAll())

    def disconnect(self, down: EngineDown) -> None:
        """End every live request with an error; nothing is accepted until the next `connect`."""
        if down.epoch != self._epoch and self.info is not None:
            return
        self._down_reason = down.reason
        self.info = None
        self._close_push()
        self._fail_all("engine_down", f"the engine went down: {down.reason}")

    def close(self) -> None:
        """Release all sockets; live requests end in an error."""
        self.info = None
        self._close_push()
        self._fail_all("engine_down", "the server is stopping")
        if self._reader is not None and self._pull is not None:
            self._reader.cancel()
            self._pull.close(linger=0)
            self._reader = self._pull = None
        self._context.destroy(linger=0)

    def require_up(self) -> None:
        """Raise the 503 error that says why nothing can be submitted now."""
        if self.info is not None:
            return
        if self._down_reason:
            message = f"the engine is down ({self._down_reason}); try again in a few seconds"
            raise WorkerDied(message, retry_after_s=RESTART_RETRY_S)
        message = "the model is still loading; /readiness tells when it is ready"
        raise CapacityError(message, code="loading", retry_after_s=LOADING_RETRY_S)

    def submit(self, request: EngineRequest, sink: OutputSink) -> None:
        """Send a request; `sink` gets its outputs until one with a finish_reason.

        Raises:
            LightLLMError: the engine is loading or down.
        """
        self.require_up()
        self._live[request.request_id] = _Live(sink, len(request.prompt_token_ids))
        self._send(request)

    def abort(self, request_id: str, reason: str = "abort") -> None:
        """Stop a request and forget its sink; an unknown id is not an error."""
        if self._live.pop(request_id, None) is not None:
            self._rate.add()
            self._send(AbortRequest(request_id=request_id, reason=reason))

    def renew_leases(self, request_ids: list[str]) -> None:
        """Tell the engine that these are still wanted."""
        self._send(RenewLeases(request_ids=request_ids))

    def retry_after_s(self) -> int:
        """Seconds after which a queue that is full now should have room, 1..60."""
        return self._rate.wait_s(max(1, self.stats.requests_waiting))

    async def ping(self, limit_s: float = PING_LIMIT_S) -> bool:
        """Whether the engine answers between two steps within `limit_s`."""
        if self._push is None:
            return False
        self._nonce += 1
        nonce = self._nonce
        pong = self._pongs[nonce] = asyncio.get_running_loop().create_future()
        self._send(Ping(nonce=nonce))
        try:
            await asyncio.wait({pong}, timeout=limit_s)
        finally:
            self._pongs.pop(nonce, None)
        return pong.done() and not pong.cancelled()

    async def refresh(self, limit_s: float) -> None:
        """Bring `stats` up to date if that takes at most `limit_s`."""
        await self.ping(limit_s)

    async def inspect(self, request_ids: list[str], limit_s: float) -> list[RequestView] | None:
        """What the engine knows of these requests; None if it does not answer within `limit_s`."""
        self._nonce += 1
        nonce = self._nonce
        answer = self._inspections[nonce] = asyncio.get_running_loop().create_future()
        self._send(Inspect(nonce=nonce, request_ids=request_ids))
        try:
            await asyncio.wait({answer}, timeout=limit_s)
        finally:
            self._inspections.pop(nonce, None)
        return answer.result() if answer.done() else None

    async def find_fault(self) -> str | None:
        """Name the part that is stuck; None when all is well.

        Heard of in the last 5 s is well; otherwise the engine must answer a ping: in 5 s when idle, when busy
        in the time that a step may take by the speed seen so far.
        """
        if self.info is None:
            return f"engine: {self._down_reason or 'loading'}"
        if time.monotonic() - self._heard_s < HEARD_LIMIT_S:
            return None
        limit_s = self._answer_limit_s()
        if await self.ping(limit_s):
            return None
        silence_s = time.monotonic() - self._heard_s
        if silence_s < HEARD_LIMIT_S:
            return None
        return f"engine: no answer for {silence_s:.0f} s"

    def _answer_limit_s(self) -> float:
        if not self._live or not self._step_s:
            return PING_LIMIT_S
        prompts = [live.num_prompt_tokens for live in self._live.values() if not live.has_output]
        num_tokens = min(self._max_step_tokens, max(prompts, default=0))
        return max(BUSY_PING_LIMIT_S, 2 * self._step_s, 2 * self._token_s * num_tokens)

    def _send(self, message: ToEngine) -> None:
        if self._push is not None:
            self._push.send(messages.encode(message), zmq.NOBLOCK)

    async def _read(self, pull: zmq.asyncio.Socket) -> None:
        decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        for count in itertools.count(1):
            # A message that waits already is received without a turn of the loop. A few of them per turn let
            # the frames of a client that are behind leave in one write; more would starve everything else.
            if not count % MAX_MESSAGES_PER_TURN:
                await asyncio.sleep(0)
            data = await pull.recv()
            self._heard_s = time.monotonic()
            try:
                message = decoder.decode(data)
            except msgspec.DecodeError as error:
                logger.error("dropped a message from the engine that does not decode: %s", error)
                continue
            self._take(message)

    def _take(self, message: FromEngine) -> None:
        match message:
            case EngineOutput(outputs=outputs):
                self._note_step(message.stats)
                if message.kv_transfers:
                    self.on_kv_transfers(message.kv_transfers)
                for output in outputs:
                    live = self._live.get(output.request_id)
                    if live is not None:  # else it was aborted in the meantime
                        self._deliver(live, output)
            case KVReserved():
                if message.request_id in self._live:
                    self.on_kv_reserved(message)
            case Inspected(nonce=nonce, views=views):
                answer = self._inspections.pop(nonce, None)
                if answer is not None:
                    answer.set_result(views)
            case Pong(nonce=nonce):
                self.stats = message.stats
                pong = self._pongs.get(nonce)
                if pong is not None and not pong.done():
                    pong.set_result(None)

    def _note_step(self, stats: EngineStats) -> None:
        is_new = stats.steps_total != self.stats.steps_total
        self.stats = stats
        if not is_new:
            return  # outputs that no step has brought: refusals, aborts, deadlines
        self._step_s = max(stats.step_duration_s, 0.9 * self._step_s)
        if stats.step_phase != "decode" and stats.step_num_tokens:
            self._token_s = max(stats.step_duration_s / stats.step_num_tokens, 0.99 * self._token_s)
        self._on_stats(stats)

    def _deliver(self, live: _Live, output: RequestOutput) -> None:
        live.has_output = True
        if output.finish_reason is not None:
            del self._live[output.request_id]
            if output.error is None:  # a refusal makes no room for anybody
                self._rate.add()
        if not hand_over(live.sink, output):
            self.abort(output.request_id)
            hand_over(live.sink, _failed(output.request_id, "internal", "the answer could not be processed"))

    def _fail_all(self, code: str, message: str) -> None:
        live, self._live = self._live, {}
        for request_id, request in live.items():
            hand_over(request.sink, _failed(request_id, code, message))

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        # No high-water marks: what may enter is bounded by admission, and a blocked send would stop the event
        # loop.
        socket = self._context.socket(kind)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            socket.setsockopt(option, 0)
        return socket

    def _listen(self, address: str) -> None:
        # The address is the frontend's own and stays over epochs; outputs of a dead engine find no sink.
        if self._pull is not None:
            return
        plain = self._socket(zmq.PULL)
        plain.bind(address)
        self._pull = zmq.asyncio.Socket.from_socket(plain)
        self._reader = asyncio.get_running_loop().create_task(self._read(self._pull), name="engine-reader")

    def _close_push(self) -> None:
        if self._push is not None:
            self._push.close(linger=0)
            self._push = None
        for pong in self._pongs.values():
            pong.cancel()
        self._pongs.clear()


def hand_over(sink: OutputSink, output: RequestOutput) -> bool:
    """Give a sink its output; False, and a line in the log, if it could not take it."""
    try:
        sink.on_output(output)
    except Exception:  # one request's bug must not silence all the others
        logger.exception("request %s: its output could not be handled", output.request_id)
        return False
    return True


def _failed(request_id: str, code: str, message: str) -> RequestOutput:
    failure = RequestFailure(code=code, message=message)
    return RequestOutput(request_id=request_id, finish_reason="error", error=failure)


def error_of(failure: RequestFailure, retry_after_s: int | None) -> LightLLMError:
    """The exception for a failure that came over the link."""
    if failure.code == "queue_full":
        return CapacityError(failure.message, code=failure.code, retry_after_s=retry_after_s)
    if failure.code == "engine_down":
        return WorkerDied(failure.message, retry_after_s=RESTART_RETRY_S)
    return LightLLMError(failure.message, code=failure.code)
