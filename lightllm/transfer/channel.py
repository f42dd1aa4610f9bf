"""Channel: one TCP connection of a KV link: handshake frames, then sealed frames, and raw bytes between them.

Reads never run ahead of what was asked for, so that a lane can read its raw bytes straight into place. Every
wait has a limit. Raw bytes carry no MAC: their block's frame does, and the link is authenticated, not secret.
Runs in a thread of the transport.
"""

import select
import socket
import struct
import time
from typing import Any

import msgspec
import numpy as np

from lightllm.cluster_link import MAX_HANDSHAKE_BYTES, LinkBroken, Refused, Seal
from lightllm.errors import KVTransferError
from lightllm.transfer import frames
from lightllm.transfer.frames import Frame

_LENGTH = struct.Struct("<I")
MAX_KV_FRAME_BYTES = 64 * 1024


class Channel:
    """Frames and bytes over a connected socket, which it owns.

    Attributes:
        seal: set once the handshake is done.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self.seal: Seal | None = None

    def fileno(self) -> int:
        """For select."""
        return self._sock.fileno()

    def send_raw(self, frame: bytes, limit_s: float) -> None:
        """Send a frame of the handshake."""
        self.send_bytes(_LENGTH.pack(len(frame)) + frame, limit_s)

    def receive_raw(self, limit_s: float, max_bytes: int = MAX_HANDSHAKE_BYTES) -> bytes:
        """Receive a frame of the handshake, all of it within `limit_s`.

        Raises:
            KVTransferError: the peer closed, or was silent for too long.
            LinkBroken: the frame is longer than allowed.
        """
        until_s = time.monotonic() + limit_s
        head = self._read(_LENGTH.size, until_s)
        (length,) = _LENGTH.unpack(head)
        if length > max_bytes:
            raise LinkBroken(f"a frame of {length} bytes; the limit is {max_bytes}")
        return bytes(self._read(length, until_s))

    def has_news(self, limit_s: float) -> bool:
        """Wait until the peer says something or hangs up; whether it has within `limit_s`."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(limit_s * 1000))

    def is_closed_there(self) -> bool:
        """Whether the peer has hung up, with nothing left of what it said; only where there is news."""
        try:
            return not self._sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def send(self, frame: Frame | Refused, limit_s: float) -> None:
        """Send a sealed frame."""
        assert self.seal is not None, "the handshake comes first"
        self.send_raw(self.seal.seal(frames.encode(frame)), limit_s)

    def receive(self, kind: Any, limit_s: float) -> Any:
        """Receive a sealed frame of the given type or union.

        Raises:
            KVTransferError, LinkBroken: as `receive_raw`, or the frame is not the peer's next one.
        """
        assert self.seal is not None, "the handshake comes first"
        body = self.seal.open(self.receive_raw(limit_s, MAX_KV_FRAME_BYTES))
        try:
            return frames.decode(body, kind)
        except msgspec.DecodeError as error:
            raise LinkBroken(f"a frame that does not belong here: {error}") from error

    def send_bytes(self, data: bytes | memoryview, limit_s: float) -> None:
        """Send raw bytes."""
        try:
            self._sock.settimeout(limit_s)
            self._sock.sendall(data)
        except TimeoutError as error:
            text = f"the peer has taken nothing for {limit_s:g} s"
            raise KVTransferError(text, fault="peer_silent") from error
        except OSError as error:
            text = f"the peer has closed the connection: {error}"
            raise KVTransferError(text, fault="peer_lost") from error

    def receive_into(self, target: np.ndarray, limit_s: float) -> None:
        """Fill a uint8 array with raw bytes."""
        self._fill(target.data, time.monotonic() + limit_s)

    def interrupt(self) -> None:
        """Make whatever waits on this channel fail now, in any thread."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has gone already

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def _read(self, size: int, until_s: float) -> bytearray:
        data = bytearray(size)
        self._fill(memoryview(data), until_s)
        return data

    def _fill(self, view: memoryview, until_s: float) -> None:
        while view:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise KVTransferError("the peer has been silent for too long", fault="peer_silent")
            try:
                self._sock.settimeout(left_s)
                count = self._sock.recv_into(view)
            except TimeoutError:
                continue
            except OSError as error:
                raise KVTransferError(f"the connection broke: {error}", fault="peer_lost") from error
            if not count:
                raise KVTransferError("the peer has closed the connection", fault="peer_lost")
            view = view[count:]
