"""A proxy on the link between a node and its master that does some harm to the next message when told to.

Runs in the event loop of the test.
"""

import asyncio
import struct

HARMS = ("drop", "twice", "swap", "late", "cut", "change")


class FrameProxy:
    """Stands in for the master at `port`; `there` is from the node to the master.

    Attributes:
        harm: (direction, kind) for the next message; gone once it is done.
        num_messages: seen in each direction, in all links so far.
    """

    def __init__(self, port: int) -> None:
        self._master = port
        self.harm: tuple[str, str] | None = None
        self.num_messages = {"there": 0, "back": 0}
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        master = await asyncio.open_connection("127.0.0.1", self._master)
        both = [self._pump("there", reader, master[1]), self._pump("back", master[0], writer)]
        for pump in both:
            task = asyncio.ensure_future(pump)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(await reader.readuntil(b"\r\n\r\n"))
            held = b""
            while True:
                frame = await _read(reader)
                out, held = [frame, held], b""
                if frame[0] & 15 == 2:
                    self.num_messages[way] += 1
                    if self.harm is not None and self.harm[0] == way:
                        kind, self.harm = self.harm[1], None
                        if kind == "cut":
                            break
                        if kind == "late":
                            await asyncio.sleep(0.5)
                        if kind == "swap":
                            held = frame
                        out = {"drop": [], "swap": [], "twice": [frame] * 2, "change": [_changed(frame)]}.get(
                            kind, out
                        )
                writer.write(b"".join(out))
        except (asyncio.IncompleteReadError, OSError):
            pass  # one of the two has hung up
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> bytes:
    """A frame of a WebSocket, with its head."""
    head = await reader.readexactly(2)
    size = head[1] & 127
    if size > 125:
        more = await reader.readexactly(2 if size == 126 else 8)
        head, size = head + more, struct.unpack(">H" if size == 126 else ">Q", more)[0]
    return head + await reader.readexactly(size + (4 if head[1] & 128 else 0))


def _changed(frame: bytes) -> bytes:
    """Another last byte."""
    return frame[:-1] + bytes([frame[-1] ^ 1])
