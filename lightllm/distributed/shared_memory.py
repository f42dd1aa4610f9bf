"""SharedMemoryCollectives: the ranks of one machine on a CPU, through memory that all have mapped.

A sum of a few KiB takes microseconds where a socket needs two changes of thread on each side, and a step has
two sums a layer. Oracle: TorchCollectives over gloo, which is also how the ranks agree on the memory. The C
side is native/src/ranks.c. Runs in the worker.
"""

import ctypes
import logging
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lightllm.distributed.collectives import LEADER, Collectives
from lightllm.native.library import NativeLibrary, NativeUnavailable

logger = logging.getLogger(__name__)

SHM = Path("/dev/shm")
BOXES_AT = 4096
MAX_RANKS = BOXES_AT // 64
BOX_BYTES = 1 << 20


class _Ranks(ctypes.Structure):
    """`struct ranks` of src/ranks.c."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("box_bytes", ctypes.c_int64),
        ("round", ctypes.c_uint64),
    )


class SharedMemoryCollectives(Collectives):
    """See the module. Float32 on the CPU is added here, all else by `others`.

    Args:
        memory: mapped by all ranks, filled with zeros.
        others: the same ranks by other means.
    """

    def __init__(
        self,
        library: NativeLibrary,
        memory: mmap.mmap,
        rank: int,
        size: int,
        others: Collectives,
        box_bytes: int = BOX_BYTES,
    ) -> None:
        self._library, self._memory, self._others = library, memory, others
        self._rank, self._size = rank, size
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._ranks = _Ranks(address, rank, size, box_bytes, 0)
        self._handle = ctypes.addressof(self._ranks)

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return self._others.all_reduce(x)
        self._library.ll_sum_ranks(self._handle, x.data_ptr(), x.numel())
        return x

    def gather_columns(self, x: Tensor, widths: tuple[int, ...]) -> Tensor:
        width = max(widths)
        x = functional.pad(x, (0, width - x.shape[1])) if x.shape[1] < width else x.contiguous()
        if self._rank != LEADER:
            self._library.ll_share_ranks(self._handle, x.data_ptr(), x.nbytes, None, 0)
            return x[:, :0]
        parts = torch.empty(self._size, *x.shape, dtype=x.dtype)
        self._library.ll_share_ranks(self._handle, x.data_ptr(), x.nbytes, parts.data_ptr(), self._size)
        return torch.cat([part[:, :own] for part, own in zip(parts, widths, strict=True)], dim=1)

    def broadcast(self, x: Tensor) -> None:
        if self._rank == LEADER:
            self._library.ll_share_ranks(self._handle, x.data_ptr(), x.nbytes, None, 0)
        else:
            self._library.ll_share_ranks(self._handle, None, x.nbytes, x.data_ptr(), 1)

    def smallest(self, value: int) -> int:
        return self._others.smallest(value)


def over_shared_memory(others: Collectives, name: str, rank: int, size: int) -> Collectives:
    """Collectives through shared memory if every rank can, else `others`.

    Args:
        others: the ranks of this machine by other means.
        name: of the memory, the same on all ranks and on nobody else; gone again when this returns.
    """
    library = _library(size)
    if not others.smallest(library is not None) or library is None:
        logger.info("ranks talk over sockets: not all of them can share memory")
        return others
    path, num_bytes = SHM / name, memory_bytes(size, BOX_BYTES)
    is_there = others.smallest(_make(path, num_bytes) if rank == LEADER else True)
    memory = _map(path, num_bytes) if is_there else None
    others.smallest(0)  # all have it
    if rank == LEADER:
        path.unlink(missing_ok=True)
    if memory is None:
        logger.info("ranks talk over sockets: %s has no room for %d KiB", SHM, num_bytes // 1024)
        return others
    logger.info("rank %d of %d talks to the others through %d KiB of memory", rank, size, num_bytes // 1024)
    return SharedMemoryCollectives(library, memory, rank, size, others)


def memory_bytes(size: int, box_bytes: int) -> int:
    """How much memory that many ranks need."""
    return BOXES_AT + 2 * size * box_bytes


def _make(path: Path, num_bytes: int) -> bool:
    """Take the memory, all of it now: what is missing later would end the process that touches it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(fd, 0, num_bytes)
        finally:
            os.close(fd)
    except OSError as error:
        logger.warning("%s: %s", path, error)
        return False
    return True


def _map(path: Path, num_bytes: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(fd, num_bytes)
    finally:
        os.close(fd)


def _library(size: int) -> NativeLibrary | None:
    if not SHM.is_dir() or size > MAX_RANKS:
        return None
    try:
        return NativeLibrary(1)
    except NativeUnavailable:
        return None  # the worker says why when it looks for the kernels
