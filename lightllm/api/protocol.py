"""uvicorn's HTTP protocol with what it lacks: direct writes, bounds, time limits and errors in our envelope.

Each request's scope carries an `HttpTransport` through which handlers write frames straight to the socket and
learn that the client has left. Bad HTTP, headers over 32 KiB (431) or later than 30 s (408) are answered
here; the body's size and time limits belong to `api.call`. An offered upgrade (h2c, as Java's client sends
with every request) is not taken, and the request served as it stands; but for WebSockets at the few paths of
node links, whose connections are handed over as a whole. Runs in the frontend's event loop.
"""

import asyncio
import functools
import http
import logging
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from lightllm.api.errors import envelope, error_headers
from lightllm.api.transport import EXTENSION, Header
from lightllm.cluster_link import MAX_HANDSHAKE_BYTES
from lightllm.errors import CapacityError, LightLLMError, RequestError
from lightllm.frontend.generator import new_request_id
from lightllm.web_socket import WebSocket, accept_head

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 32 * 1024
HEAD_LIMIT_S = 30.0
KEEP_ALIVE_S = 30
# A client that does not read what it asked for is cut off at this much unsent data.
MAX_UNSENT_BYTES = 1024 * 1024
FINISH_LIMIT_S = 60.0
# How much of a body is read and thrown away after an early answer, so that the client gets to read that
# answer.
MAX_DISCARDED_BYTES = 64 * 1024 * 1024
DISCARD_LIMIT_S = 10.0
# A complete answer must leave at this pace at least, or the connection is cut.
UNSENT_CHECK_S = 60.0
LEAST_READ_BYTES = 64 * 1024
# Headers that offer another protocol; left out of a request that is served in this one.
UPGRADE_HEADERS = (b"upgrade", b"connection", b"http2-settings")
# Open files that are no connections, and how many of them may be clients that are being turned away.
RESERVED_FILES = 96
MAX_TURNED_AWAY = 32
TURN_AWAY_S = 1.0


WebSockets = Mapping[bytes, Callable[[WebSocket], None]]


class Turns:
    """Which turn of the event loop it is, for all clients of a server.

    Attributes:
        began_s: monotonic time of the first frame in this turn, a float of its own for each turn; 0.0 while
            none has been written.
        late: clients with frames that wait for the end of the turn.
    """

    def __init__(self) -> None:
        self.began_s = 0.0
        self.late: list[HttpTransport] = []

    def begin(self) -> float:
        """The first frame of a turn is being written."""
        self.began_s = time.monotonic()
        asyncio.get_running_loop().call_soon(self._end)
        return self.began_s

    def _end(self) -> None:
        self.began_s = 0.0
        late, self.late = self.late, []
        for client in late:
            client.flush()


class HttpTransport:
    """The client of one request on our own protocol; see `transport.ClientTransport`.

    A client's first frame in a turn of the event loop is sent at once, what comes behind it in that turn
    together at its end: a frontend that is behind writes less often.
    """

    __slots__ = (
        *("_callbacks", "_cycle", "_frames", "_is_chunked", "_is_open"),
        *("_transport", "_turns", "fault", "is_gone", "written_s"),
    )

    def __init__(self, protocol: "LightLLMProtocol", cycle: RequestResponseCycle) -> None:
        self.is_gone = False
        self.fault: LightLLMError | None = None
        self.written_s = time.monotonic()
        self._turns = protocol.turns
        self._transport = protocol.transport
        self._cycle = cycle
        self._is_chunked = cycle.scope["http_version"] != "1.0"
        self._is_open = False
        # Written before the status line, or behind the first frame of this turn.
        self._frames: list[bytes] = []
        self._callbacks: list[Callable[[], None]] = []

    async def open(self, status: int, headers: Iterable[Header]) -> None:
        """Send the status line and headers, then every frame written before."""
        if not self._is_chunked:
            # HTTP/1.0 knows no chunks: the end of the connection is the end of the body.
            self._cycle.chunked_encoding = False
            self._cycle.keep_alive = False
        await self._cycle.send({"type": "http.response.start", "status": status, "headers": list(headers)})
        if not self.is_gone:
            self._is_open = True
            self.written_s = time.monotonic()
            self.flush()

    def write(self, data: bytes) -> None:
        """Send one frame of the body; never blocks, cuts off a client that does not read."""
        now_s = self._turns.began_s or self._turns.begin()
        if self._is_open and self.written_s is not now_s:
            self.written_s = now_s
            self._send(data)
            return
        if self._is_open and not self._frames:
            self._turns.late.append(self)
        self._frames.append(data)

    def flush(self) -> None:
        """Send all frames that wait, as one chunk."""
        if self._frames and not self.is_gone:
            data = b"".join(self._frames)
            self._frames.clear()
            self._send(data)

    def _send(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            logger.warning("a client does not read its answer: connection cut at %d bytes", MAX_UNSENT_BYTES)
            self._transport.abort()
            self.lose()

    async def finish(self, *, close: bool = False) -> None:
        """End the body; with `close` the connection too."""
        self.flush()
        if self.is_gone:
            return
        if close:
            self._cycle.keep_alive = False
        try:
            async with asyncio.timeout(FINISH_LIMIT_S):
                await self._cycle.send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            self._transport.abort()

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call back once when the client leaves before the end; at once if it has left."""
        if self.is_gone:
            callback()
        else:
            self._callbacks.append(callback)

    def release(self) -> None:
        """The exchange is over; nothing to clean up here."""

    def break_body(self, fault: LightLLMError) -> None:
        """Called by the protocol when the body turns out to be broken: whoever reads it is told."""
        self.fault = fault
        self._cycle.keep_alive = False
        self._cycle.message_event.set()

    def lose(self) -> None:
        """Called by the protocol when the connection is gone."""
        if self.is_gone:
            return
        self.is_gone = True
        self._is_open = False
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        for callback in self._callbacks:
            callback()


class LightLLMProtocol(HttpToolsProtocol):
    """One client connection."""

    def __init__(
        self, *args: Any, turns: Turns, web_sockets: WebSockets | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.turns = turns
        self._web_sockets = web_sockets or {}
        self._clients: list[HttpTransport] = []
        self._refusal: LightLLMError | None = None
        self._is_broken = False
        self._has_upgrade = False
        self._is_in_head = True
        self._head_bytes = 0
        self._head_size = 0
        self._discarded_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._discard_timer: asyncio.TimerHandle | None = None
        self._unsent_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_LIMIT_S, self._head_is_late)
        limit = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_FILES)
        if len(self.connections) > limit:
            self._turn_away(limit)

    def _turn_away(self, limit: int) -> None:
        """Refuse a connection for which there are no open files left, without keeping it for long."""
        self._is_broken = True
        if len(self.connections) > limit + MAX_TURNED_AWAY:
            self.transport.abort()
            return
        message = (
            f"{limit} connections are open, all that this process may have; close idle ones, or raise the "
            "limit of open files (ulimit -n) of the server"
        )
        self._refusal = CapacityError(message, code="queue_full", retry_after_s=1)
        self._write_refusal()
        # Closed with its request unread, the connection would be reset and the answer with it.
        self.transport.write_eof()
        self._discard_timer = self.loop.call_later(TURN_AWAY_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        clients, self._clients = self._clients, []
        super().connection_lost(exc)
        for client in clients:
            client.lose()

    def data_received(self, data: bytes) -> None:
        if self._is_broken:
            return
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_LIMIT_S, self._head_is_late)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
            if not self._hand_over(rest):
                self._serve_without_upgrade(rest)
        except httptools.HttpParserError:
            self.send_400_response("")
        # The parser keeps an unfinished header to itself, so what came in is counted, too.
        if self._is_in_head and self._head_bytes > 2 * MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refusal = _head_too_large()
            self.send_400_response("")

    def _hand_over(self, rest: bytes) -> bool:
        """Make a WebSocket of this connection, if it asks for one at a path that has them."""
        headers = dict(self.headers)
        key = headers.get(b"sec-websocket-key", b"")
        accept = self._web_sockets.get(self.url.partition(b"?")[0])
        is_wanted = headers.get(b"upgrade", b"").lower() == b"websocket" and bool(key)
        if accept is None or not is_wanted or self._clients or self.parser.get_method() != b"GET":
            return False
        self._cancel_timers()
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        self._is_broken = True  # for bytes that the event loop has for us already
        socket = WebSocket(MAX_HANDSHAKE_BYTES)
        self.transport.write(accept_head(key))
        self.transport.set_protocol(socket)
        socket.connection_made(self.transport)
        accept(socket)
        if rest:
            socket.data_received(rest)
        return True

    def _serve_without_upgrade(self, rest: bytes) -> None:
        """Parse the request just read once more, without the headers at which the parser has stopped.

        Args:
            rest: what came behind its head.
        """
        self._has_upgrade = False
        method, connection = self.parser.get_method(), b""
        lines = [b"%b %b HTTP/1.1" % (method, self.url)]
        for name, value in self.headers:
            if name == b"connection":
                connection = value.lower()
            if name not in UPGRADE_HEADERS:
                lines.append(name + b": " + value)
        if method == b"CONNECT":  # asks for a tunnel by its method
            self.send_400_response("")
            return
        if b"close" in connection:
            lines.append(b"connection: close")
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._head_size = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_head(len(name) + len(value) + 4)

    def _count_head(self, num_bytes: int) -> None:
        self._head_size += num_bytes
        if self._head_size > MAX_HEAD_BYTES:
            self._refusal = _head_too_large()
            raise self._refusal  # the parser turns it into its own error, and uvicorn calls send_400_response

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._head_bytes = 0
        self._discarded_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._has_upgrade = self.parser.should_upgrade()
        if self._has_upgrade:
            return
        super().on_headers_complete()
        cycle = self.cycle
        # The task of this request has been created, but not begun: its scope may still be completed.
        client = HttpTransport(self, cycle)
        self._clients.append(client)
        extensions: dict[str, Any] = {EXTENSION: client}
        cast(dict[str, Any], self.scope)["extensions"] = extensions
        cycle.on_response = functools.partial(self._response_is_complete, client, cycle)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.cycle.response_complete:
            self._discarded_bytes += len(body)
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.abort()

    def on_message_complete(self) -> None:
        self._is_in_head = True
        if self._has_upgrade:
            return
        super().on_message_complete()
        if not self.pipeline:
            # It stopped at 64 KiB of a body; without it nobody sees that a client leaves.
            self.flow.resume_reading()
        if self._discard_timer is not None:
            self._discard_timer.cancel()
            self._discard_timer = None

    def _response_is_complete(self, client: HttpTransport, cycle: RequestResponseCycle) -> None:
        if client in self._clients:
            self._clients.remove(client)
        if self._unsent_timer is None and self.transport.get_write_buffer_size():
            unsent = self.transport.get_write_buffer_size()
            self._unsent_timer = self.loop.call_later(UNSENT_CHECK_S, self._check_unsent, unsent)
        self.on_response_complete()
        if self._is_broken and not self._clients and not self.transport.is_closing():
            self._refuse_connection()
            return
        if cycle is self.cycle and cycle.more_body and not self.transport.is_closing():
            if self.expect_100_continue:
                self.transport.close()  # the body will not come, or comes where a request is expected
            else:
                self._discard_timer = self.loop.call_later(DISCARD_LIMIT_S, self.transport.close)

    def _check_unsent(self, before: int) -> None:
        """Cut off a client that hardly reads an answer which is complete on our side."""
        self._unsent_timer = None
        unsent = self.transport.get_write_buffer_size()
        if unsent > max(0, before - LEAST_READ_BYTES):
            logger.warning("a client does not read its answer: connection cut with %d bytes unsent", unsent)
            self.transport.abort()
        elif unsent:
            self._unsent_timer = self.loop.call_later(UNSENT_CHECK_S, self._check_unsent, unsent)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._is_broken:
            return
        if self._clients:  # an earlier answer of this connection is still under way
            self._head_timer = self.loop.call_later(HEAD_LIMIT_S, self._head_is_late)
        elif self._head_bytes:
            limit = f"{HEAD_LIMIT_S:.0f} s"
            self._refusal = LightLLMError(
                f"the request's headers took longer than {limit}", code="body_timeout"
            )
            self.send_400_response("")
        else:
            self.transport.close()

    def _cancel_timers(self) -> None:
        for timer in (self._head_timer, self._discard_timer, self._unsent_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._discard_timer = self._unsent_timer = None

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no HTTP: after the answers that are still due, and as the last one."""
        self._is_broken = True
        if self._refusal is None:
            self._refusal = RequestError("the request is not valid HTTP/1.1", code="bad_json")
        logger.debug("refused what %s sent: %s", self.client, self._refusal.message)
        if self.cycle is not None and self.cycle.more_body:  # it is the body of a request that is broken
            if self.cycle.response_complete:
                self.transport.close()
            else:
                self._clients[-1].break_body(self._refusal)
        elif not self._clients:
            self._refuse_connection()

    def _refuse_connection(self) -> None:
        self._write_refusal()
        self.transport.close()

    def _write_refusal(self) -> None:
        assert self._refusal is not None
        status = self._refusal.kind.status
        body = envelope(self._refusal)
        lines = [
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            f"x-request-id: {new_request_id()}",
            "connection: close",
        ]
        lines += [f"{name.decode()}: {value.decode()}" for name, value in error_headers(self._refusal)]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def _head_too_large() -> RequestError:
    return RequestError(f"the headers are larger than {MAX_HEAD_BYTES} bytes", code="headers_too_large")


def uvicorn_config(
    app: Any, *, version: str, loop: str = "uvloop", web_sockets: WebSockets | None = None
) -> uvicorn.Config:
    """How the frontend runs uvicorn: our protocol, no access log, no signal or log set-up of its own.

    Args:
        web_sockets: path -> who takes the WebSockets opened there.
    """
    protocol = functools.partial(LightLLMProtocol, turns=Turns(), web_sockets=web_sockets)
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], protocol),
        ws="none",
        loop=loop,
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        log_level="warning",
        server_header=False,
        headers=[("server", f"lightllm/{version}")],
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=2048,
    )
