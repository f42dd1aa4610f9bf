"""SymmetricMemoryCollectives: small sums of the GPUs of one machine, through memory that all have mapped.

A decode step adds a few KiB twice a layer, and the fixed cost of a call is all there is to save. Whether
torch's kernels over symmetric memory or NCCL's have less of it depends on the machine (between two H100s
NCCL's have): up to which size to take them is measured at start. Oracle: TorchCollectives over NCCL, which is
also how the ranks agree. Runs in the worker.
"""

import logging
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightllm.distributed.collectives import Collectives, Store, TorchCollectives, dist

logger = logging.getLogger(__name__)

GROUP = "lightllm"
BOX_BYTES = 4 << 20
ALIGNMENT = 16
DTYPES = (torch.bfloat16, torch.float32)
# What is measured at start: calls of one graph, and how often it runs.
SIZES = tuple(16 * 1024 << shift for shift in range(9))
CALLS, REPLAYS = 20, 5


class Limits(NamedTuple):
    """Up to how many bytes each way is taken; NCCL above. `two_shot` is not under `one_shot`.

    In one shot every rank reads all of all others; in two, it adds its part and reads the others' sums.
    """

    one_shot: int
    two_shot: int


class SymmetricMemoryCollectives(Collectives):
    """See the module.

    Args:
        box: [BOX_BYTES] uint8, this rank's part of the memory.
        group: the ranks under the name GROUP; torch knows it only for as long as it is held.
        others: the same ranks over NCCL.
        limits: the same on all ranks.
    """

    def __init__(self, box: Tensor, group: Any, others: Collectives, limits: Limits) -> None:
        self._box, self._group, self._others, self._limits = box, group, others, limits

    def all_reduce(self, x: Tensor) -> Tensor:
        num_bytes = x.nbytes
        if num_bytes > self._limits.two_shot or num_bytes % ALIGNMENT or x.dtype not in DTYPES:
            return self._others.all_reduce(x)
        flat = x.view(-1)
        return (one_shot if num_bytes <= self._limits.one_shot else two_shot)(self._box, flat).view(x.shape)

    def gather_columns(self, x: Tensor, widths: tuple[int, ...]) -> Tensor:
        return self._others.gather_columns(x, widths)

    def broadcast(self, x: Tensor) -> None:
        self._others.broadcast(x)

    def smallest(self, value: int) -> int:
        return self._others.smallest(value)


def one_shot(box: Tensor, x: Tensor) -> Tensor:
    """Sum a flat tensor over all ranks, in place."""
    mine = box[: x.nbytes].view(x.dtype)
    torch.ops.symm_mem.one_shot_all_reduce_copy_out(mine, x, "sum", GROUP, x)
    return x


def two_shot(box: Tensor, x: Tensor) -> Tensor:
    """The same by two steps."""
    mine = box[: x.nbytes].view(x.dtype)
    mine.copy_(x)
    torch.ops.symm_mem.two_shot_all_reduce_out(mine, "sum", GROUP, x)
    return x


def over_symmetric_memory(others: TorchCollectives, store: Store) -> Collectives:
    """Collectives through symmetric memory for what it is faster at, if every rank can, else `others`.

    Args:
        others: the ranks, GPUs of this machine, over NCCL.
        store: where they meet.
    """
    why_not = _why_not(others.size, others.device)
    if not others.smallest(not why_not):
        return _without(others, why_not)
    group = _name_group(others, store)
    box = None
    try:
        box = _map_box(others.device)
    except RuntimeError as error:  # a driver or a machine on which memory cannot be shared like this
        why_not = str(error)
    if not others.smallest(box is not None) or box is None:
        return _without(others, why_not)
    limits = _measure(box, others)
    logger.info(
        "sums go through symmetric memory up to %d KiB in one shot and up to %d KiB in two, else through "
        "NCCL: the fastest of each size, measured",
        limits.one_shot // 1024,
        limits.two_shot // 1024,
    )
    return SymmetricMemoryCollectives(box, group, others, limits)


def _without(others: Collectives, why_not: str) -> Collectives:
    logger.info("sums of all sizes go through NCCL: %s", why_not or "another rank cannot share memory")
    return others


def _why_not(size: int, device: torch.device) -> str:
    """Why this rank cannot reach the memory of the others; empty: it can."""
    for peer in range(size):
        if peer != device.index and not torch.cuda.can_device_access_peer(device.index, peer):
            return f"GPU {device.index} cannot reach the memory of GPU {peer}"
    return ""


def _name_group(others: TorchCollectives, store: Store) -> Any:
    """The ranks as a group that symmetric memory finds by its name; nobody needs torch's default group."""
    from torch._C import _distributed_c10d

    torch_c: Any = _distributed_c10d
    group = dist.ProcessGroup(dist.PrefixStore("symmetric memory", store), others.rank, others.size)
    nccl = dist.ProcessGroup.BackendType.NCCL
    group._register_backend(torch.device("cuda"), nccl, others.group)
    group._set_default_backend(nccl)
    group._set_group_name(GROUP)
    torch_c._register_process_group(GROUP, group)
    return group


def _map_box(device: torch.device) -> Tensor:
    from torch._C import _distributed_c10d

    torch_c: Any = _distributed_c10d
    memory = torch_c._SymmetricMemory
    box: Tensor = memory.empty_strided_p2p((BOX_BYTES,), (1,), torch.uint8, device, GROUP)
    memory.rendezvous(box, GROUP)
    return box


def _measure(box: Tensor, others: Collectives) -> Limits:
    """Up to which sizes each way is the fastest; all ranks get the same."""
    fastest: list[int] = []
    for num_bytes in SIZES:
        x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=box.device)
        ways: tuple[Callable[[Tensor], Any], ...] = (
            lambda x: one_shot(box, x),
            lambda x: two_shot(box, x),
            others.all_reduce,
        )
        times = [_time_us(way, x) for way in ways]
        logger.debug(
            "sum of %d KiB: one shot %.1f us, two shots %.1f us, NCCL %.1f us", num_bytes // 1024, *times
        )
        fastest.append(times.index(min(times)))
    wins = [fastest_from_below(fastest, ways) for ways in ((0,), (0, 1))]
    return Limits(*(others.smallest(SIZES[won - 1] if won else 0) for won in wins))


def fastest_from_below(fastest: list[int], ways: tuple[int, ...]) -> int:
    """For how many sizes, from the smallest on, one of these ways is the fastest.

    Args:
        fastest: the fastest way of each size.
    """
    return next((i for i, way in enumerate(fastest) if way not in ways), len(fastest))


def _time_us(way: Callable[[Tensor], Any], x: Tensor) -> float:
    """Of one call among many in a graph: what it costs in a decode step."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        way(x)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(CALLS):
            way(x)
        graph.capture_end()
        times = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return float(statistics.median(times))
