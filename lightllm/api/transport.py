"""How an answer reaches its client: one interface over our HTTP protocol's socket and over plain ASGI.

`write` is synchronous, so that a token goes from the engine's message to the socket without a task in
between. Until `open` has sent the status line, frames are kept and may still be dropped in favour of a real
error status.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from lightllm.errors import LightLLMError

EXTENSION = "lightllm.transport"

Header = tuple[bytes, bytes]
Send = Callable[[dict[str, Any]], Any]
Receive = Callable[[], Any]


class ClientTransport(Protocol):
    """The client's end of one HTTP exchange.

    Attributes:
        is_gone: the client has left, or was cut off because it does not read.
        fault: what is wrong with the bytes of the request's body, None while nothing is.
        written_s: monotonic time of the last frame, or of the beginning.
    """

    is_gone: bool
    fault: LightLLMError | None
    written_s: float

    async def open(self, status: int, headers: Iterable[Header]) -> None:
        """Send the status line and headers, then every frame written before."""
        ...

    def write(self, data: bytes) -> None:
        """Send one frame of the body; never blocks."""
        ...

    async def finish(self, *, close: bool = False) -> None:
        """End the body; with `close` the connection too."""
        ...

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call back once when the client leaves before the end; at once if it has left."""
        ...

    def release(self) -> None:
        """The exchange is over: stop whatever was started for it."""
        ...


class AsgiTransport:
    """A client behind a plain ASGI server: frames pass through a queue and one task."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.is_gone = False
        self.fault: LightLLMError | None = None
        self.written_s = time.monotonic()
        self._receive = receive
        self._send = send
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._sender: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._callbacks: list[Callable[[], None]] = []

    async def open(self, status: int, headers: Iterable[Header]) -> None:
        """Send the status line and headers, then every frame written before."""
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})
        self._sender = asyncio.get_running_loop().create_task(self._pump())

    def write(self, data: bytes) -> None:
        """Send one frame of the body; never blocks."""
        self.written_s = time.monotonic()
        self._frames.put_nowait(data)

    async def finish(self, *, close: bool = False) -> None:
        """End the body."""
        self._frames.put_nowait(None)
        if self._sender is not None:
            await self._sender

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call back once when the client leaves before the end."""
        self._callbacks.append(callback)
        if self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._watch())

    def release(self) -> None:
        """The exchange is over: stop whatever was started for it."""
        for task in (self._watcher, self._sender):
            if task is not None:
                task.cancel()

    async def _pump(self) -> None:
        while (data := await self._frames.get()) is not None:
            if not self.is_gone:
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        for callback in self._callbacks:
            callback()


def transport_of(scope: dict[str, Any], receive: Receive, send: Send) -> ClientTransport:
    """The transport that our protocol put into the scope, or one over plain ASGI."""
    transport: ClientTransport | None = scope.get("extensions", {}).get(EXTENSION)
    return transport or AsgiTransport(receive, send)
