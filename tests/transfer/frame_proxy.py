"""A proxy between the two ends of a KV link that knows where frames begin, and does one of them some harm.

Counts the frames of each direction of a connection from 0. Runs in threads of the test.
"""

import contextlib
import socket
import struct
import threading
import time

import msgspec

from lightllm.cluster_link import HEAD_BYTES

LENGTH = struct.Struct("<I")
HARMS = ("drop", "twice", "swap", "late", "cut", "change")


class FrameProxy:
    """Stands in for the receiver.

    Args:
        address: of the receiver, tcp://host:port.
        token_bytes: KV of a token where bytes follow their frames, 0 where they do not.

    Attributes:
        address: its own.
        harm: (direction, index, kind): `there` is from the sender; None: leave all as it is.
        frames: what has been forwarded in each direction, with the bytes behind it.
        reached: set when the frame of `harm` is there; one of kind `hold` is cut off when `release` is set.
    """

    def __init__(self, address: str, token_bytes: int) -> None:
        host, port = address.removeprefix("tcp://").split(":")
        self._target = host, int(port)
        self._token_bytes = token_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.harm: tuple[str, int, str] | None = None
        self.frames: dict[str, list[bytes]] = {"there": [], "back": []}
        self.reached = threading.Event()
        self.release = threading.Event()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Cut all connections."""
        for one in self._sockets:
            with contextlib.suppress(OSError):  # it has been cut already
                one.shutdown(socket.SHUT_RDWR)  # a close alone is not seen while another thread reads
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                dialled, _ = self._listener.accept()
                target = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets += [dialled, target]
            for name, source, sink in (("there", dialled, target), ("back", target, dialled)):
                threading.Thread(target=self._pump, args=(name, source, sink), daemon=True).start()

    def _pump(self, name: str, source: socket.socket, sink: socket.socket) -> None:
        held = b""
        try:
            for index, unit in enumerate(iter(lambda: self._read(source), b"")):
                out = [unit, held] if held else [unit]
                held = b""
                if self.harm is not None and self.harm[:2] == (name, index):
                    self.reached.set()
                    kind = self.harm[2]
                    if kind == "hold":
                        self.release.wait(20)
                    if kind in ("cut", "hold"):
                        break
                    if kind == "swap":
                        held, out = unit, []
                    out = {
                        "drop": [],
                        "twice": [unit, unit],
                        "change": [_changed(unit)],
                    }.get(kind, out)
                    if kind == "late":
                        time.sleep(0.1)
                for piece in out:
                    sink.sendall(piece)
                    self.frames[name].append(piece)
        except OSError:
            pass  # one of the two has hung up
        for one in (source, sink):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it was faster

    def _read(self, source: socket.socket) -> bytes:
        """A frame with its length, and the bytes that belong to it; empty at the end."""
        head = self._exactly(source, LENGTH.size)
        if len(head) < LENGTH.size:
            return b""
        frame = self._exactly(source, LENGTH.unpack(head)[0])
        return head + frame + self._exactly(source, self._num_behind(frame))

    def _num_behind(self, frame: bytes) -> int:
        if not self._token_bytes:
            return 0
        try:
            body = msgspec.msgpack.decode(frame[HEAD_BYTES:])
        except msgspec.DecodeError:
            return 0
        is_block = isinstance(body, dict) and body.get("type") == "Block"
        return body["count"] * self._token_bytes if is_block else 0

    @staticmethod
    def _exactly(source: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = source.recv(size - len(data))
            if not piece:
                return b""
            data += piece
        return data


def _changed(unit: bytes) -> bytes:
    """One bit of the frame; the bytes behind it have no MAC."""
    place = LENGTH.size + HEAD_BYTES // 2
    return unit[:place] + bytes([unit[place] ^ 1]) + unit[place + 1 :]
