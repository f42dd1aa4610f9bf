"""CudaIpc: memory of one process's GPU that another process of the same host reads, by handle.

The CUDA driver's own functions (cuIpcGetMemHandle and its kin in the CUDA driver API), by ctypes: a handle is
64 bytes that mean nothing to anybody but the driver, and what is opened stays so until it is closed here.
torch's functions for this count readers in a file whose name and index come from the peer, unchecked, and
close when the last tensor goes. Runs in the worker.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

HANDLE_BYTES = 64
LAZY_ENABLE_PEER_ACCESS = 1


class Exported(NamedTuple):
    """Where another process finds a tensor: `offset` bytes into what the handle opens."""

    handle: bytes
    offset: int


class Opened(NamedTuple):
    """Memory of another process, as this one's GPU reads it; both in bytes."""

    address: int
    size: int


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class CudaIpc:
    """Exports memory of one GPU, and opens that of others for it. Any thread may use it.

    Raises:
        OSError: there is no driver with these functions.
    """

    def __init__(self, device: torch.device) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._context = ctypes.c_void_p()
        ordinal = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(ordinal), ctypes.c_int(device.index or 0))
        # The one that torch uses, too; threads have none before they first use the GPU.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), ordinal)

    def export(self, tensor: Tensor) -> Exported:
        """Let other processes open the memory of a tensor: the whole allocation that it is a part of.

        Raises:
            OSError: it cannot be, as memory that was not allocated by cudaMalloc.
        """
        self._call("cuCtxSetCurrent", self._context)
        handle = _Handle()
        base, _ = self._range_of(tensor.data_ptr())
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
        return Exported(bytes(handle.reserved), tensor.data_ptr() - base)

    def open(self, handle: bytes) -> Opened:
        """Open memory of another process, HANDLE_BYTES long. Every call wants one of `close`.

        Raises:
            OSError: it is not on this host, is gone, or this GPU cannot reach it.
        """
        self._call("cuCtxSetCurrent", self._context)
        address = ctypes.c_uint64()
        self._call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            _Handle.from_buffer_copy(handle),
            ctypes.c_uint(LAZY_ENABLE_PEER_ACCESS),
        )
        try:
            return Opened(address.value, self._range_of(address.value)[1])
        except OSError:
            self.close(address.value)
            raise

    def close(self, address: int) -> None:
        """Undo one `open`; no kernel reads there any more."""
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def _range_of(self, address: int) -> tuple[int, int]:
        """Beginning and size of the allocation around an address."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        arguments = ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
        self._call("cuMemGetAddressRange_v2", *arguments)
        return base.value, size.value

    def _call(self, name: str, *arguments: object) -> None:
        try:
            code = getattr(self._driver, name)(*arguments)
        except AttributeError as error:
            raise OSError(f"this CUDA driver has no {name}") from error
        if code:
            word = ctypes.c_char_p()
            self._driver.cuGetErrorName(ctypes.c_int(code), ctypes.byref(word))
            raise OSError(f"{name}: {(word.value or b'unknown').decode()} ({code})")
