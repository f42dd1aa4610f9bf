"""WebSockets (RFC 6455) for the links between nodes: binary messages, delivered by plain calls.

L0. One `asyncio.Protocol` for both ends: the HTTP server hands a connection over once it has seen the upgrade
request, `connect` makes the request itself. No extensions, no text messages. A message reaches its reader
within the call in which its last byte arrived, without a queue or a task in between. Knows nothing of what
messages say.
"""

import asyncio
import base64
import hashlib
import os
import struct
from collections.abc import Callable
from typing import cast

from lightllm.errors import ClusterError

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
MAX_HEAD_BYTES = 8 * 1024
MAX_CONTROL_BYTES = 125
CONNECT_LIMIT_S = 5.0
# A peer that does not read what it is sent is cut off at this much unsent data.
MAX_UNSENT_BYTES = 64 * 1024 * 1024


class WebSocketRefused(ClusterError):
    """The server does not serve a WebSocket at this path; the message has its first line."""


def accept_key(key: bytes) -> bytes:
    """What a server answers to Sec-WebSocket-Key."""
    return base64.b64encode(hashlib.sha1(key + GUID, usedforsecurity=False).digest())


def accept_head(key: bytes) -> bytes:
    """The answer that turns an HTTP connection into a WebSocket."""
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept_key(key) + b"\r\n\r\n"
    )


class WebSocket(asyncio.Protocol):
    """One end of a connection.

    Args:
        limit_bytes: the longest message taken; a longer one closes the connection.
        request: the HTTP request that a client begins with, empty at a server.
        key: the client's Sec-WebSocket-Key, which the answer must match.

    Attributes:
        on_message: called with each whole message.
        on_closed: called once with the reason when the connection is gone.
    """

    def __init__(self, limit_bytes: int, request: bytes = b"", key: bytes = b"") -> None:
        self.limit_bytes = limit_bytes
        self.on_message: Callable[[bytes], None] = _ignore
        self.on_closed: Callable[[str], None] = _ignore_reason
        self.opened: asyncio.Future[None] | None = None
        self._request = request
        self._key = key
        self._is_client = bool(request)
        self._is_in_head = self._is_client
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._begun: bytearray | None = None  # of a message in pieces, what has come
        self._reason = ""
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._is_closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # the event loop's own may be no subclass
        if self._request:
            self._transport.write(self._request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closed = True
        reason = self._reason or (f"connection lost: {exc}" if exc else "closed by the peer")
        if self.opened is not None and not self.opened.done():
            self.opened.set_exception(WebSocketRefused(reason))
        on_closed, self.on_closed, self.on_message = self.on_closed, _ignore_reason, _ignore
        on_closed(reason)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._is_in_head and not self._take_head():
            return
        while not self._is_closed and self._take_frame():
            pass

    def send(self, message: bytes) -> None:
        """Send one binary message; never blocks. Nothing happens once the connection is closed."""
        if self._is_closed or self._transport is None:
            return
        self._transport.write(_frame(BINARY, message, is_masked=self._is_client))
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.abort("the peer does not read what it is sent")

    def close(self, reason: str) -> None:
        """Say good-bye, send what is buffered, then close."""
        if self._is_closed or self._transport is None:
            return
        self._reason = self._reason or reason
        self._is_closed = True
        text = struct.pack(">H", 1000) + reason.encode()[: MAX_CONTROL_BYTES - 2]
        self._transport.write(_frame(CLOSE, text, is_masked=self._is_client))
        self._transport.close()

    def abort(self, reason: str) -> None:
        """Cut the connection at once."""
        self._reason = self._reason or reason
        self._is_closed = True
        if self._transport is not None:
            self._transport.abort()

    def _take_head(self) -> bool:
        """Check the server's answer to our request; False while it is not complete."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                self.abort("the server's answer is no WebSocket's")
            return False
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        self._is_in_head = False
        fields = {
            name.strip().lower(): value.strip() for name, _, value in (x.partition(b":") for x in lines)
        }
        is_ours = fields.get(b"sec-websocket-accept") == accept_key(self._key)
        if not lines[0].startswith(b"HTTP/1.1 101") or not is_ours:
            self.abort(f"no WebSocket here: {lines[0][:80].decode('latin-1')}")
            return False
        if self.opened is not None and not self.opened.done():
            self.opened.set_result(None)
        return True

    def _take_frame(self) -> bool:
        """Take one whole frame out of the buffer; False if there is none."""
        buffer = self._buffer
        if len(buffer) < 2:
            return False
        first, second = buffer[0], buffer[1]
        opcode, length, start = first & 15, second & 127, 2
        if length == 126:
            if len(buffer) < 4:
                return False
            (length,), start = struct.unpack_from(">H", buffer, 2), 4
        elif length == 127:
            if len(buffer) < 10:
                return False
            (length,), start = struct.unpack_from(">Q", buffer, 2), 10
        fault = self._fault(first, second, length)
        if fault:
            self.abort(fault)
            return False
        mask_at, start = start, start + (0 if self._is_client else 4)
        if len(buffer) < start + length:
            return False
        payload = bytes(buffer[start : start + length])
        if not self._is_client:
            payload = _masked(payload, bytes(buffer[mask_at:start]))
        del buffer[: start + length]
        self._take(opcode, payload, is_last=bool(first & 128))
        return True

    def _fault(self, first: int, second: int, length: int) -> str:
        opcode = first & 15
        if first & 0x70:
            return "a WebSocket frame with an extension that was not agreed"
        if opcode not in (CONTINUATION, BINARY, CLOSE, PING, PONG):
            return f"a WebSocket frame of kind {opcode}; only binary ones are taken"
        if bool(second & 128) == self._is_client:
            return "a WebSocket frame masked as only the other side's are"
        if opcode >= CLOSE and (length > MAX_CONTROL_BYTES or not first & 128):
            return "a WebSocket control frame that is too long or in pieces"
        if (opcode == CONTINUATION) != (self._begun is not None) and opcode < CLOSE:
            return "pieces of WebSocket messages in a wrong order"
        if len(self._begun or b"") + length > self.limit_bytes:
            return f"a message over {self.limit_bytes} bytes"
        return ""

    def _take(self, opcode: int, payload: bytes, *, is_last: bool) -> None:
        if opcode == PING:
            assert self._transport is not None
            # Not each ping needs its pong, and a peer that reads none must not make us keep them.
            if self._transport.get_write_buffer_size() <= self.limit_bytes:
                self._transport.write(_frame(PONG, payload, is_masked=self._is_client))
        elif opcode == CLOSE:
            self.close(payload[2:].decode("utf-8", "replace") or "closed by the peer")
        elif opcode != PONG:
            if is_last and self._begun is None:
                self.on_message(payload)
                return
            self._begun = self._begun if self._begun is not None else bytearray()
            self._begun += payload
            if is_last:
                message, self._begun = bytes(self._begun), None
                self.on_message(message)


async def connect(host: str, port: int, path: str, limit_bytes: int) -> WebSocket:
    """Open a WebSocket to ws://host:port/path; the caller sets `on_message` before the next turn of the loop.

    Raises:
        OSError: nobody answers there.
        WebSocketRefused: somebody does, but not with a WebSocket.
        TimeoutError: not within CONNECT_LIMIT_S.
    """
    key = base64.b64encode(os.urandom(16))
    shown = f"[{host}]" if ":" in host else host
    request = (
        f"GET {path} HTTP/1.1\r\nHost: {shown}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key.decode()}\r\n\r\n"
    ).encode()
    loop = asyncio.get_running_loop()
    socket = WebSocket(limit_bytes, request, key)
    socket.opened = loop.create_future()
    early: list[bytes] = []
    socket.on_message = early.append  # what comes together with the answer
    async with asyncio.timeout(CONNECT_LIMIT_S):
        await loop.create_connection(lambda: socket, host, port)
        try:
            await socket.opened
        except BaseException:
            socket.abort("given up")
            raise

    if early:
        loop.call_soon(_replay, socket, early)
    return socket


def _frame(opcode: int, payload: bytes, *, is_masked: bool) -> bytes:
    length, bit = len(payload), 128 if is_masked else 0
    if length < 126:
        head = struct.pack(">BB", 128 | opcode, bit | length)
    elif length < 65536:
        head = struct.pack(">BBH", 128 | opcode, bit | 126, length)
    else:
        head = struct.pack(">BBQ", 128 | opcode, bit | 127, length)
    if not is_masked:
        return head + payload
    mask = os.urandom(4)
    return b"".join((head, mask, _masked(payload, mask)))


def _masked(payload: bytes, mask: bytes) -> bytes:
    """XOR with the repeated mask, as one long number."""
    size = len(payload)
    repeated = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(repeated, "little")).to_bytes(size, "little")


def _replay(socket: WebSocket, messages: list[bytes]) -> None:
    for message in tuple(messages):  # a caller that has set nothing appends to this list
        socket.on_message(message)


def _ignore(message: bytes) -> None:
    return


def _ignore_reason(reason: str) -> None:
    return
