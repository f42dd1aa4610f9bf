"""The lane between two processes of one host: the sender packs into shared memory, the receiver reads there.

The memory is an anonymous file that the receiver opens through /proc, so that nothing is left behind however
either process ends. A nonce at its end proves that the two mean the same memory, and so are on one host; a
seal keeps the file from shrinking, which would kill a reader.
"""

import fcntl
import hmac
import logging
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
    Cut,
    Lane,
    LaneUnavailable,
    ReceivingEnd,
    SendingEnd,
    StagedReceiver,
    StagedSender,
)
from lightllm.transfer.plan import KVRows

logger = logging.getLogger(__name__)

NONCE_BYTES = 32


class Segment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the sender's memory is found, and what stands at its end."""

    pid: int
    fd: int
    nonce: bytes


class ShmLane(Lane):
    """See the module."""

    def __init__(self, rows: KVRows, block_bytes: int | None = None) -> None:
        super().__init__(rows, block_bytes)
        self._is_pinning = True

    def pin(self, memory: Tensor) -> bool:
        """Make memory fast to copy where the KV is on a device; whether it wants to be unpinned.

        Where that is not possible, copies to and from the device take longer.
        """
        if self._is_pinning:
            try:
                self.rows.pin(memory)
            except OSError as error:
                logger.warning("KV link: shm is slower than it could be: %s", error)
                self._is_pinning = False
        return self._is_pinning

    def open_sender(self) -> SendingEnd:
        return _Sender(self)

    def open_receiver(self, fields: bytes, cut: Cut) -> ReceivingEnd:
        return _Receiver(self, fields, cut)


class _Mapping:
    """The file in this process's memory; pinned when a block is first moved: most offers are not taken."""

    def __init__(self, lane: ShmLane, fd: int, size: int) -> None:
        # Writable for the receiver, too, because torch knows no other memory.
        self._memory = torch.from_numpy(np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8))
        self._lane = lane
        self._is_pinned: bool | None = None

    @property
    def nonce(self) -> np.ndarray:
        """What stands at the end."""
        return self._memory[-NONCE_BYTES:].numpy()

    def block(self, index: int, block_bytes: int, size: int) -> Tensor:
        """The first bytes of a block's place, where blocks are of at most `block_bytes`."""
        if self._is_pinned is None:
            self._is_pinned = self._lane.pin(self._memory)
        start = index % WINDOW * block_bytes
        return self._memory[start : start + size]

    def close(self) -> None:
        """Give it up; the memory goes with the last tensor on it."""
        if self._is_pinned:
            self._lane.rows.unpin(self._memory)
        self._is_pinned = None
        self._memory = torch.empty(0, dtype=torch.uint8)


class _Sender(StagedSender):
    def __init__(self, lane: ShmLane) -> None:
        super().__init__(lane)
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._fd = os.memfd_create("lightllm-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        size = WINDOW * lane.block_bytes + NONCE_BYTES
        os.ftruncate(self._fd, size)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self._mapping = _Mapping(lane, self._fd, size)
        self._mapping.nonce[:] = np.frombuffer(self._nonce, dtype=np.uint8)

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(Segment(pid=os.getpid(), fd=self._fd, nonce=self._nonce))

    def staging(self, index: int) -> Tensor:
        return self._mapping.block(index, self.cut.block_bytes, self.cut.block_bytes)

    def push(self, channel: Channel, index: int, size: int, limit_s: float) -> None:
        return  # it lies where the receiver looks

    def close(self) -> None:
        self._mapping.close()
        os.close(self._fd)


class _Receiver(StagedReceiver):
    def __init__(self, lane: ShmLane, fields: bytes, cut: Cut) -> None:
        super().__init__(lane, cut)
        try:
            segment = msgspec.msgpack.decode(fields, type=Segment)
            fd = os.open(f"/proc/{segment.pid}/fd/{segment.fd}", os.O_RDWR | os.O_CLOEXEC)
        except (OSError, msgspec.DecodeError) as error:
            raise LaneUnavailable(f"the sender's memory is not on this host: {error}") from error
        try:
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise LaneUnavailable("the sender's memory could shrink")
            size, least = os.fstat(fd).st_size, WINDOW * cut.block_bytes + NONCE_BYTES
            if size < least:
                raise LaneUnavailable(f"the sender's memory has {size} bytes; at least {least} are needed")
            self._mapping = _Mapping(lane, fd, size)
        except OSError as error:
            raise LaneUnavailable(f"the sender's memory cannot be read here: {error}") from error
        finally:
            os.close(fd)
        if not hmac.compare_digest(self._mapping.nonce.tobytes(), segment.nonce):
            raise LaneUnavailable("what lies there is not the sender's memory")

    def fetch(self, channel: Channel, block: Block, size: int, limit_s: float) -> Tensor:
        return self._mapping.block(block.index, self.cut.block_bytes, size)

    def close(self) -> None:
        self._mapping.close()
