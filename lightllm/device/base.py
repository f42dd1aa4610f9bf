"""Device: what the worker has to know of the place where tensors live, one subclass per kind.

Owns the difference between a CPU, on which everything is done when a call returns, and a GPU, which runs
behind the calls: how arrays get there and back, what memory there is, which dtype is native. Knows no model.
Runs in the worker.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

# Name -> class, imported only when asked for.
DEVICES: Mapping[str, str] = MappingProxyType(
    {"cpu": "lightllm.device.device:CpuDevice", "cuda": "lightllm.device.cuda:CudaDevice"}
)


class Download(ABC):
    """Tensors on their way to the host."""

    @abstractmethod
    def result(self) -> tuple[np.ndarray, ...]:
        """Wait for them; blocks only the calling thread and leaves Python's lock free meanwhile."""


class Moment(ABC):
    """A point in the order of a device's work: behind all that was called for until it was marked."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until the device is past it; blocks only the calling thread, which may be any."""

    @abstractmethod
    def is_past(self) -> bool:
        """Whether the device is past it; any thread may ask."""


class PastMoment(Moment):
    """One that the device is past already."""

    def wait(self) -> None:
        return

    def is_past(self) -> bool:
        return True


class ApproachedMoment(Moment):
    """An urgent one (`Device.mark`) behind another one, up to which threads sleep that wait for it."""

    def __init__(self, near: Moment, urgent: Moment) -> None:
        self.near, self.urgent = near, urgent

    def wait(self) -> None:
        self.near.wait()
        self.urgent.wait()

    def is_past(self) -> bool:
        return self.urgent.is_past()


class Device(ABC):
    """One device.

    Attributes:
        name: as in `--device`.
        torch_device: for torch's `device=` arguments.
        is_async: calls return before the work is done.
        label: what it is, for the log.
    """

    name: ClassVar[str]
    is_async: ClassVar[bool]
    torch_device: torch.device
    label: str

    @abstractmethod
    def choose_dtype(self, asked: str, checkpoint: str) -> tuple[torch.dtype, str]:
        """Choose the dtype to compute in.

        Args:
            asked: `auto`, or the name of a torch dtype.
            checkpoint: the dtype the weights were stored in, by name.

        Returns:
            The dtype, and the reason in words for the log.
        """

    @abstractmethod
    def free_memory_bytes(self) -> int:
        """Memory that can be taken now."""

    @abstractmethod
    def total_memory_bytes(self) -> int:
        """All memory there is, whoever uses it."""

    @abstractmethod
    def prepare(self) -> None:
        """Set up this process before anything is loaded."""

    @abstractmethod
    def prepare_to_compute(self, num_threads: int) -> str:
        """Set up the calling thread after loading; returns what was set, in words for the log."""

    @abstractmethod
    def upload(self, array: np.ndarray, into: Tensor | None = None) -> Tensor:
        """Copy an array there, in order with the work before and after; never waits for it.

        Args:
            array: not to be changed afterwards, where calls are done at once.
            into: a tensor of the same shape and dtype; a new one when left out.

        Returns:
            The tensor.
        """

    @abstractmethod
    def download(self, *tensors: Tensor) -> Download:
        """Start to fetch tensors, in order with the work before; the tensors may be reused at once."""

    @abstractmethod
    def side_queue(self) -> AbstractContextManager[object]:
        """Make a queue of work beside the one of steps: inside it, calls are in order with each other only.

        Can be entered again and again, by any thread, but by one at a time.
        """

    @abstractmethod
    def pin(self, memory: Tensor) -> None:
        """Make memory of the host that is not torch's own fast to copy from and to, until `unpin`.

        Raises:
            OSError: the system does not allow it.
        """

    @abstractmethod
    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`; no copy is on its way."""

    @abstractmethod
    def mark(self, is_urgent: bool = False) -> Moment:
        """Mark this moment; never waits for the device.

        Args:
            is_urgent: of the threads that wait for it one keeps a core busy meanwhile; had it slept until the
                device calls, it would wake up to 0.2 ms late in a virtual machine.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything is done that was called for."""


def make_device(name: str, index: int = 0) -> Device:
    """Make the device of that key of DEVICES; `index` says which, where a machine has several.

    Raises:
        ConfigError: it cannot be used here.
    """
    module, _, attribute = DEVICES[name].partition(":")
    make: Any = getattr(importlib.import_module(module), attribute)
    return cast(Device, make(index))
