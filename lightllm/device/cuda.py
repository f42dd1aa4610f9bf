"""CudaDevice: one of the visible NVIDIA GPUs.

All steps run on one stream, so that work is done in the order of the calls; the host runs ahead and waits
only in `Download.result`. KV transfers have streams of their own. Runs in the worker.
"""

import threading
from contextlib import AbstractContextManager
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightllm.device.base import Device, Download, Moment
from lightllm.errors import ConfigError

# The oldest architecture that the kernels are written for: bfloat16 and asynchronous copies.
MIN_CAPABILITY = (8, 0)
RING_BYTES = 4 << 20
RING_ALIGNMENT = 64


def compute_capability(device: torch.device) -> tuple[int, int]:
    """The architecture of a GPU, major and minor."""
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


class CudaMoment(Moment):
    """An event behind what was called for on the calling thread's stream; threads sleep until it comes."""

    SLEEPS: ClassVar[bool] = True

    def __init__(self) -> None:
        self._event = torch.cuda.Event(blocking=self.SLEEPS)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def is_past(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class UrgentMoment(CudaMoment):
    """One for which the first thread that waits stays awake, and wakes all others."""

    SLEEPS: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._watch = threading.Lock()
        self._is_over = threading.Event()

    def wait(self) -> None:
        if self._watch.acquire(blocking=False):
            try:
                super().wait()
            finally:
                self._is_over.set()
        else:
            self._is_over.wait()
            super().wait()  # raises what the device has raised


class CudaDownload(Download):
    """Pinned copies of tensors, and the moment behind the last of them."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._copies = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self._done = CudaMoment()

    def result(self) -> tuple[np.ndarray, ...]:
        self._done.wait()
        return tuple(copy.numpy() for copy in self._copies)


class PinnedRing:
    """Pinned memory through which arrays are uploaded, over and over: pinning anew costs more than the copy.

    Two halves are used in turn. Before one is used again, the last copy out of it is waited for, though that
    one is as good as always done. For one thread.

    Args:
        num_bytes: of both halves.
    """

    def __init__(self, num_bytes: int) -> None:
        self._halves = torch.empty(2, num_bytes // 2, dtype=torch.uint8, pin_memory=True).unbind()
        self._events = [torch.cuda.Event(), torch.cuda.Event()]  # type: ignore[no-untyped-call]
        self._current = 0
        self._start = 0

    def stage(self, source: Tensor) -> Tensor:
        """A pinned copy of a tensor of the host, valid for what is queued on the current stream right now."""
        if source.nbytes > self._halves[0].nbytes:
            return source.pin_memory()
        if self._start + source.nbytes > self._halves[0].nbytes:
            self._events[self._current].record()
            self._current = 1 - self._current
            self._events[self._current].synchronize()
            self._start = 0
        place = self._halves[self._current][self._start : self._start + source.nbytes]
        self._start += -(-source.nbytes // RING_ALIGNMENT) * RING_ALIGNMENT
        return place.view(source.dtype).view(source.shape).copy_(source)


class CudaDevice(Device):
    """See the base class.

    Args:
        index: in the list of visible GPUs; made the current one of this thread.

    Raises:
        ConfigError: there is no usable GPU; the message says why.
    """

    name: ClassVar[str] = "cuda"
    is_async: ClassVar[bool] = True

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
            raise ConfigError(
                f"--device cuda: torch {torch.__version__} ({build}) sees no GPU; check the driver, "
                "CUDA_VISIBLE_DEVICES and the build of torch, or use --device cpu"
            )
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        properties = torch.cuda.get_device_properties(self.torch_device)
        capability = (properties.major, properties.minor)
        if capability < MIN_CAPABILITY:
            raise ConfigError(
                f"--device cuda: {properties.name} has compute capability {capability[0]}.{capability[1]}; "
                f"the kernels need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}; use --device cpu"
            )
        self.label = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        self._ring = PinnedRing(RING_BYTES)

    def choose_dtype(self, asked: str, checkpoint: str) -> tuple[torch.dtype, str]:
        """See the base class; every dtype is native from MIN_CAPABILITY on."""
        if asked != "auto":
            return getattr(torch, asked), "as asked"
        return getattr(torch, checkpoint), "the dtype of the checkpoint"

    def free_memory_bytes(self) -> int:
        """Memory that the driver has left, and what torch holds without using it."""
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + unused

    def total_memory_bytes(self) -> int:
        return int(torch.cuda.mem_get_info()[1])

    def prepare(self) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        # Sums in bfloat16 inside a matrix product would cost accuracy for nothing that is measurable.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def prepare_to_compute(self, num_threads: int) -> str:
        torch.set_num_threads(1)  # the host only launches
        torch.cuda.set_device(self.torch_device)
        torch.cuda.empty_cache()
        return self.label

    def upload(self, array: np.ndarray, into: Tensor | None = None) -> Tensor:
        pinned = self._ring.stage(torch.from_numpy(array))
        if into is None:
            return pinned.to(self.torch_device, non_blocking=True)
        return into.copy_(pinned, non_blocking=True)

    def download(self, *tensors: Tensor) -> Download:
        return CudaDownload(tensors)

    def side_queue(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(torch.cuda.Stream(self.torch_device))  # type: ignore[no-untyped-call]

    def pin(self, memory: Tensor) -> None:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if code:
            raise OSError(f"{memory.nbytes} bytes of host memory cannot be pinned: CUDA error {code}")

    def unpin(self, memory: Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]

    def mark(self, is_urgent: bool = False) -> Moment:
        return UrgentMoment() if is_urgent else CudaMoment()

    def synchronize(self) -> None:
        torch.cuda.synchronize()
