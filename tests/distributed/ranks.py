"""Ranks as threads of the test's process, each with a gloo group of its own: real sockets, no start-up."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.distributed as dist

from lightllm.distributed.collectives import connect
from lightllm.distributed.parallel_state import Parallel

T = TypeVar("T")


def run_ranks(size: int, work: Callable[[Parallel], T]) -> list[T]:
    """Run `work` once per rank, all at the same time; results in the order of ranks."""
    store = dist.HashStore()

    def run(rank: int) -> T:
        torch.set_num_threads(1)  # of this thread; teams of all ranks would fight for the cores
        group = connect(store, rank, size, "127.0.0.1", torch.device("cpu"))
        return work(Parallel(rank, size, rank, size, group))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
