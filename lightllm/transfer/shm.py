"""The lane between two processes of one host: the sender packs into shared memory, the receiver reads there.

The memory is an anonymous file that the receiver opens through /proc, so that nothing is left behind however
either process ends. A nonce at its end proves that the two mean the same memory, and so are on one host; a
seal keeps the file from shrinking, which would kill a reader.
"""

import fcntl
import hmac
import mmap
import os
import secrets

import msgspec
import numpy as np
import torch
from torch import Tensor

from lightllm.transfer.channel import Channel
from lightllm.transfer.frames import Block
from lightllm.transfer.lane import (
    WINDOW,
    Lane,
    LaneUnavailable,
    ReceivingEnd,
    SendingEnd,
    StagedReceiver,
    StagedSender,
)

NONCE_BYTES = 32


class Segment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the sender's memory is found, and what stands at its end."""

    pid: int
    fd: int
    nonce: bytes


class ShmLane(Lane):
    """See the module."""

    def open_sender(self) -> SendingEnd:
        return _Sender(self)

    def open_receiver(self, fields: bytes) -> ReceivingEnd:
        return _Receiver(self, fields)


class _Sender(StagedSender):
    def __init__(self, lane: Lane) -> None:
        super().__init__(lane)
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        size = WINDOW * lane.block_bytes + NONCE_BYTES
        self._fd = os.memfd_create("lightllm-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, size)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self._memory = _map(self._fd, size)
        self._memory[-NONCE_BYTES:].numpy()[:] = np.frombuffer(self._nonce, dtype=np.uint8)

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(Segment(pid=os.getpid(), fd=self._fd, nonce=self._nonce))

    def staging(self, index: int) -> Tensor:
        start = index % WINDOW * self.lane.block_bytes
        return self._memory[start : start + self.lane.block_bytes]

    def push(self, channel: Channel, index: int, size: int, limit_s: float) -> None:
        return  # it lies where the receiver looks

    def close(self) -> None:
        # The mapping goes with the last tensor on it.
        self._memory = torch.empty(0, dtype=torch.uint8)
        os.close(self._fd)


class _Receiver(StagedReceiver):
    def __init__(self, lane: Lane, fields: bytes) -> None:
        super().__init__(lane)
        size = WINDOW * lane.block_bytes + NONCE_BYTES
        try:
            segment = msgspec.msgpack.decode(fields, type=Segment)
            fd = os.open(f"/proc/{segment.pid}/fd/{segment.fd}", os.O_RDWR | os.O_CLOEXEC)
        except (OSError, msgspec.DecodeError) as error:
            raise LaneUnavailable(f"the sender's memory is not on this host: {error}") from error
        try:
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise LaneUnavailable("the sender's memory could shrink")
            if os.fstat(fd).st_size != size:
                raise LaneUnavailable(f"the sender's memory has {os.fstat(fd).st_size} bytes, not {size}")
            self._memory = _map(fd, size)
        except OSError as error:
            raise LaneUnavailable(f"the sender's memory cannot be read here: {error}") from error
        finally:
            os.close(fd)
        if not hmac.compare_digest(self._memory[-NONCE_BYTES:].numpy().tobytes(), segment.nonce):
            raise LaneUnavailable("what lies there is not the sender's memory")

    def fetch(self, channel: Channel, block: Block, size: int, limit_s: float) -> Tensor:
        start = block.index % WINDOW * self.lane.block_bytes
        return self._memory[start : start + size]

    def close(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)


def _map(fd: int, size: int) -> Tensor:
    """The file as a tensor. Writable for the receiver, too, because torch knows no other kind."""
    return torch.from_numpy(np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8))
