"""What a peer that has proved nothing yet can make a WebSocket cost, over a real connection."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from lightllm.web_socket import BINARY, CONTINUATION, PING, WebSocket

LIMIT_BYTES = 64 * 1024
MASK = bytes(4)  # which changes nothing


def frame(opcode: int, payload: bytes = b"", *, is_last: bool = True) -> bytes:
    """A client's frame with a short payload."""
    return bytes([opcode | (128 if is_last else 0), 128 | len(payload)]) + MASK + payload


def run(test: Callable[[WebSocket, asyncio.Transport, asyncio.StreamWriter], Awaitable[None]]) -> None:
    """Call `test` with a server's end, its transport and a client that may write any bytes."""

    async def main() -> None:
        made: asyncio.Future[tuple[WebSocket, asyncio.Transport]] = asyncio.get_running_loop().create_future()

        class Accepted(WebSocket):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                assert isinstance(transport, asyncio.Transport)
                made.set_result((self, transport))

        server = await asyncio.get_running_loop().create_server(lambda: Accepted(LIMIT_BYTES), "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            await asyncio.wait_for(test(*await made, writer), 30)
        finally:
            writer.transport.abort()
            server.close()

    asyncio.run(main())


def test_a_message_in_many_empty_pieces_costs_no_more_than_its_bytes() -> None:
    async def test(socket: WebSocket, transport: asyncio.Transport, writer: asyncio.StreamWriter) -> None:
        heard: asyncio.Queue[bytes] = asyncio.Queue()
        socket.on_message = heard.put_nowait
        began_s = time.monotonic()
        writer.write(frame(BINARY, b"a", is_last=False))
        writer.write(frame(CONTINUATION, is_last=False) * 50_000 + frame(CONTINUATION, b"z"))
        assert await heard.get() == b"az"
        assert time.monotonic() - began_s < 5
        writer.write(frame(BINARY, b"next"))
        assert await heard.get() == b"next"

    run(test)


def test_pieces_count_together() -> None:
    async def test(socket: WebSocket, transport: asyncio.Transport, writer: asyncio.StreamWriter) -> None:
        closed: asyncio.Queue[str] = asyncio.Queue()
        socket.on_closed = closed.put_nowait
        piece = frame(CONTINUATION, bytes(125), is_last=False)
        writer.write(frame(BINARY, is_last=False) + piece * (LIMIT_BYTES // 125 + 1))
        assert await closed.get() == f"a message over {LIMIT_BYTES} bytes"

    run(test)


def test_pongs_that_nobody_reads_are_not_kept() -> None:
    async def test(socket: WebSocket, transport: asyncio.Transport, writer: asyncio.StreamWriter) -> None:
        most = 0
        for _ in range(100):
            writer.write(frame(PING, bytes(125)) * 2000)
            await writer.drain()
            most = max(most, transport.get_write_buffer_size())
        assert 0 < most < 2 * LIMIT_BYTES

    run(test)
