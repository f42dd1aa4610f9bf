"""Collectives: how ranks add, gather and hand on tensors; one object, given to whoever needs it.

`SingleRank` does nothing and is what a model on one rank gets. `TorchCollectives` is a process group of
torch: gloo on a CPU, NCCL on GPUs. All ranks must make the same calls in the same order. No default group and
no state of the module: a process may be a member of several groups. Runs in the worker.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional

from lightllm.errors import WorkerDied

logger = logging.getLogger(__name__)

# The names that are used here are public, but torch's type stubs leave them out.
dist: Any = torch.distributed
Store = Any
# A rank that is gone is noticed by whoever started it, long before this.
TIMEOUT = timedelta(minutes=10)
LEADER = 0


class Collectives(ABC):
    """What ranks do together. Tensors lie on the device that the group was made for.

    Raises:
        WorkerDied: another rank is gone.
    """

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum a contiguous tensor over all ranks, in place, and return it; the same bits on every rank."""

    @abstractmethod
    def gather_columns(self, x: Tensor, widths: tuple[int, ...]) -> Tensor:
        """Put the columns of all ranks beside each other, on the leader.

        Args:
            x: [n, widths[rank]].
            widths: columns of each rank, in the order of ranks.

        Returns:
            [n, sum(widths)] on the leader, [n, 0] elsewhere.
        """

    @abstractmethod
    def broadcast(self, x: Tensor) -> None:
        """Overwrite a contiguous tensor by the leader's."""

    @abstractmethod
    def smallest(self, value: int) -> int:
        """The smallest of all ranks' numbers."""


class SingleRank(Collectives):
    """There are no others."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather_columns(self, x: Tensor, widths: tuple[int, ...]) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> None:
        return

    def smallest(self, value: int) -> int:
        return value


class TorchCollectives(Collectives):
    """A process group of torch.

    Args:
        group: ProcessGroupGloo or ProcessGroupNCCL.
        rank, size: this process's place in it.
        device: where its tensors lie.
    """

    def __init__(self, group: Any, rank: int, size: int, device: torch.device) -> None:
        self.group, self.rank, self.size, self.device = group, rank, size, device
        self._sum, self._gather, self._broadcast, self._minimum = (
            _on_callers_stream(options)
            for options in (
                dist.AllreduceOptions(),
                dist.GatherOptions(),
                dist.BroadcastOptions(),
                dist.AllreduceOptions(),
            )
        )
        self._minimum.reduceOp = dist.ReduceOp.MIN

    def all_reduce(self, x: Tensor) -> Tensor:
        _wait(self.group.allreduce, [x], self._sum)
        return x

    def gather_columns(self, x: Tensor, widths: tuple[int, ...]) -> Tensor:
        width = max(widths)
        x = functional.pad(x, (0, width - x.shape[1])) if x.shape[1] < width else x.contiguous()
        if self.rank != LEADER:
            _wait(self.group.gather, [], [x], self._gather)
            return x[:, :0]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        _wait(self.group.gather, [parts], [x], self._gather)
        return torch.cat([part[:, :own] for part, own in zip(parts, widths, strict=True)], dim=1)

    def broadcast(self, x: Tensor) -> None:
        _wait(self.group.broadcast, [x], self._broadcast)

    def smallest(self, value: int) -> int:
        x = torch.tensor([value], device=self.device)
        _wait(self.group.allreduce, [x], self._minimum)
        return int(x.item())


def _on_callers_stream(options: Any) -> Any:
    """Without the events between two streams that NCCL on one of its own would need at each call."""
    options.asyncOp = False
    return options


def _wait(call: Callable[..., Any], *arguments: Any) -> None:
    try:
        work = call(*arguments)
        if work is not None:  # queued on the caller's stream, NCCL has nothing to be waited for
            work.wait()
    except RuntimeError as error:
        raise WorkerDied(f"another rank is gone: {error}") from error


def connect(store: Store, rank: int, size: int, host: str, device: torch.device) -> TorchCollectives:
    """Join the other ranks; blocks until all are there.

    Args:
        store: where they find each other.
        host: the address of this machine at which the others reach it; used on a CPU.
        device: where tensors will lie.

    Raises:
        WorkerDied: the others did not come within TIMEOUT.
    """
    try:
        group = _gloo(store, rank, size, host) if device.type == "cpu" else _nccl(store, rank, size)
    except RuntimeError as error:
        raise WorkerDied(f"rank {rank} of {size} could not join the others: {error}") from error
    name = "gloo" if device.type == "cpu" else "NCCL"
    logger.info("rank %d of %d has joined the others over %s", rank, size, name)
    return TorchCollectives(group, rank, size, device)


def _gloo(store: Store, rank: int, size: int, host: str) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = TIMEOUT
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = TIMEOUT
    return dist.ProcessGroupNCCL(store, rank, size, options)


def file_store(path: Path, size: int) -> Store:
    """Where the ranks of one machine meet: a file in a private directory, so that no port is needed."""
    return dist.FileStore(str(path), size)


def tcp_store(host: str, port: int, size: int, listen_fd: int | None) -> Store:
    """Where the ranks of several machines meet; not authenticated, as torch has it.

    Args:
        host, port: of rank 0.
        listen_fd: rank 0's listening socket, bound to that address only; None for the others.
    """
    return dist.TCPStore(
        host,
        port,
        size,
        is_master=listen_fd is not None,
        timeout=TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )
