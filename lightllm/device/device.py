"""The CPU as a device: facts about it, and the process-wide settings that computing on it needs.

Owns the choice of compute dtype on a CPU. Knows nothing of models beyond the name of their dtype. Runs in the
worker.
"""

import ctypes
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightllm.device.base import Device, Download, Moment, PastMoment

CGROUP = Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")

# CPU flags (x86, then ARM) of which one must be present for matrix products in a dtype to run natively.
NATIVE_FLAGS: Mapping[torch.dtype, frozenset[str]] = MappingProxyType(
    {
        torch.bfloat16: frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
        torch.float16: frozenset({"avx512_fp16", "amx_fp16", "fphp"}),
    }
)

# glibc's mallopt: the largest block taken from the heap instead of mapped afresh, and the free memory at the
# heap's end above which it is given back.
M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES = -1, 256 * 1024**2
M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES = -3, 32 * 1024**2


def cpu_flags() -> frozenset[str]:
    """Return the instruction set flags of this CPU; empty where the system does not list them."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _read(CPUINFO), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def choose_dtype(asked: str, checkpoint: str, flags: frozenset[str] | None = None) -> tuple[torch.dtype, str]:
    """Choose the dtype to compute in.

    Args:
        asked: `auto`, or the name of a torch dtype, which is then obeyed even where it is slow.
        checkpoint: the dtype the weights were stored in, by name.
        flags: the CPU's; read from the machine when left out.

    Returns:
        The dtype, and the reason in words for the log.
    """
    flags = cpu_flags() if flags is None else flags
    name = checkpoint if asked == "auto" else asked
    dtype: torch.dtype = getattr(torch, name)
    needed = NATIVE_FLAGS.get(dtype, frozenset())
    is_native = not needed or bool(needed & flags)
    if asked != "auto":
        warning = "" if is_native else f"; slow, this CPU emulates {name}"
        return dtype, f"as asked{warning}"
    if is_native:
        return dtype, "the dtype of the checkpoint"
    return (
        torch.float32,
        f"the checkpoint is {name}, which this CPU emulates ({', '.join(sorted(needed))} missing)",
    )


def set_threads(num_threads: int) -> int:
    """Set how many threads one torch operation uses, and return it; 0 leaves torch's choice.

    Call it in the thread that computes, before the first operation.
    """
    if num_threads > 0:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def give_back_freed_memory() -> bool:
    """Give memory that was freed back to the system: the loader's threads leave some in their heaps.

    Returns:
        Whether the allocator has such a call (glibc).
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return False
    return True


def keep_freed_memory() -> bool:
    """Let the C allocator keep freed memory for the next step instead of giving it back to the system.

    By default every activation above some 100 KiB is unmapped when freed, and its successor faults each page
    in again: measured 4.5 ms instead of 1.2 ms to gather and attend 16 sequences of 300 tokens. Call it after
    the weights are loaded, so that what loading freed is given back.

    Returns:
        Whether the allocator has such a setting (glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES) and mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
    )


def free_memory_bytes() -> int:
    """Return the memory that can be taken without swapping, within the container's limit."""
    meminfo = re.search(r"^MemAvailable:\s+(\d+) kB", _read(MEMINFO), re.MULTILINE)
    free = int(meminfo[1]) * 1024 if meminfo else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = _read(CGROUP / "memory.max").strip(), _read(CGROUP / "memory.current").strip()
    if not limit.isdigit() or not used.isdigit():
        return free
    # The container's page cache counts as used, and the kernel gives it back.
    cached = re.search(r"^inactive_file (\d+)", _read(CGROUP / "memory.stat"), re.MULTILINE)
    return max(0, min(free, int(limit) - int(used) + (int(cached[1]) if cached else 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


class Fetched(Download):
    """Tensors that are on the host already."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tensors

    def result(self) -> tuple[np.ndarray, ...]:
        return tuple(tensor.numpy() for tensor in self._tensors)


class CpuDevice(Device):
    """See the base class: every call is done when it returns. All ranks of a machine share the one CPU."""

    name: ClassVar[str] = "cpu"
    is_async: ClassVar[bool] = False

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cpu")
        self.label = f"{os.cpu_count()} hardware threads"

    def choose_dtype(self, asked: str, checkpoint: str) -> tuple[torch.dtype, str]:
        return choose_dtype(asked, checkpoint)

    def free_memory_bytes(self) -> int:
        return free_memory_bytes()

    def total_memory_bytes(self) -> int:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def prepare(self) -> None:
        set_threads(1)  # the loader's threads would each bring a team of their own

    def prepare_to_compute(self, num_threads: int) -> str:
        give_back_freed_memory()
        keep_freed_memory()
        return f"{set_threads(num_threads)} threads"

    def upload(self, array: np.ndarray, into: Tensor | None = None) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if into is None else into.copy_(tensor)

    def download(self, *tensors: Tensor) -> Download:
        return Fetched(tensors)

    def side_queue(self) -> AbstractContextManager[object]:
        return nullcontext()

    def pin(self, memory: Tensor) -> None:
        return

    def unpin(self, memory: Tensor) -> None:
        return

    def mark(self, is_urgent: bool = False) -> Moment:
        return PastMoment()

    def synchronize(self) -> None:
        return
