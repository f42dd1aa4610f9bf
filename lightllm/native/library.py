"""NativeLibrary: the shared library of C kernels, found, loaded and started.

Plain C functions through ctypes, which releases the interpreter's lock while they run; no torch headers, so
that one build serves every torch. The library's thread pool and its choice of kernels belong to the process;
only one thread may compute at a time. Knows addresses and sizes, never tensors. Runs in the worker.
"""

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

VERSION = 2
PANEL = 16
QROWS = 8
QBLOCK = 32
QUERY_ROWS = 96
SPLIT = 128
MAX_HEAD_DIM = 256
MAX_GROUP = 16
W4_BLOCK_BYTES = 160
W8_BLOCK_BYTES = 272

_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
# Arguments of each function; src/dispatch.c has their meaning.
_LINEAR = (_P, _L, _P, _P, _P, _L, _L, _L, _L)  # x, ldx, w, bias, out, ldo, m, k, n
_ROWS = (_P, _L, _P, _L, _P)  # w, k, indices, count, out
SIGNATURES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("ll_linear_f32", _LINEAR),
    ("ll_linear_w4", (*_LINEAR, _P)),  # scratch: see scratch_bytes
    ("ll_linear_w8", (*_LINEAR, _P)),
    ("ll_pack_f32", (_P, _L, _L, _L, _P)),  # from, first row, rows, k, to
    ("ll_pack_w4", (_P, _P, _P, _L, _L, _L, _P)),  # q, d, m, first row, rows, k, to
    ("ll_pack_w8", (_P, _P, _L, _L, _L, _P)),  # q, d, first row, rows, k, to
    ("ll_rows_f32", _ROWS),
    ("ll_rows_w4", _ROWS),
    ("ll_rows_w8", _ROWS),
    ("ll_rms_norm", (_P, _L, _P, _P, _F, _P, _L, _L)),  # x, ldx, residual, weight, eps, out, m, size
    ("ll_rotate", (_P, _L, _P, _P, _L, _L, _L, _L)),  # x, token stride, cos, sin, tokens, heads, dim, half
    ("ll_gate", (_P, _P, _L, _L, _I)),  # gate_up, out, m, size, is_gelu
    ("ll_attend", (_P, _P, _L, _P, _L, _P, _L)),  # attention, then parts and their number, three times
    ("ll_sum_ranks", (_P, _P, _L)),  # ranks, x, n
    ("ll_share_ranks", (_P, _P, _L, _P, _L)),  # ranks, x, bytes, out, number of ranks to read
)


class Attention(ctypes.Structure):
    """`struct attention` of src/kernels.h."""

    _fields_ = (
        *((name, _P) for name in ("q", "k", "v", "pool_k", "pool_v", "out", "partial", "out_slots", "slots")),
        *((name, _P) for name in ("rows", "seq_lens", "query_lens", "starts", "parts")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_tokens", "q_stride", "k_stride", "v_stride", "slots_stride")
        ),
        *((name, ctypes.c_int32) for name in ("num_q_heads", "num_kv_heads", "head_dim", "window")),
        *((name, _F) for name in ("scale", "softcap")),
    )


class NativeUnavailable(Exception):
    """There is no library to use; the message says why and what to do."""


class NativeLibrary:
    """The library's functions by name (`library.ll_gate(...)`).

    Args:
        num_threads: that compute, the caller included; the pool only ever grows.
        kernels: `generic`, `avx2` or `avx512-vnni`; None takes the best that this processor runs.

    Attributes:
        kernels: the instruction set in use.
        num_threads: threads there are now.

    Raises:
        NativeUnavailable: the library was not built, is of another version, or lacks these kernels.
    """

    ll_linear_f32: Callable[..., None]
    ll_linear_w4: Callable[..., None]
    ll_linear_w8: Callable[..., None]
    ll_pack_f32: Callable[..., None]
    ll_pack_w4: Callable[..., None]
    ll_pack_w8: Callable[..., None]
    ll_rows_f32: Callable[..., None]
    ll_rows_w4: Callable[..., None]
    ll_rows_w8: Callable[..., None]
    ll_rms_norm: Callable[..., None]
    ll_rotate: Callable[..., None]
    ll_gate: Callable[..., None]
    ll_attend: Callable[..., None]
    ll_sum_ranks: Callable[..., None]
    ll_share_ranks: Callable[..., None]

    def __init__(self, num_threads: int, kernels: str | None = None) -> None:
        path = library_path()
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailable(f"{path} cannot be loaded: {error}") from error
        version = library.ll_version()
        if version != VERSION:
            raise NativeUnavailable(
                f"{path} has version {version}, expected {VERSION}; install the package again"
            )
        library.ll_start.argtypes = (ctypes.c_char_p, _I)
        library.ll_kernels.restype = ctypes.c_char_p
        self.num_threads: int = library.ll_start(kernels.encode() if kernels else None, num_threads)
        if not self.num_threads:
            raise NativeUnavailable(f"kernels {kernels!r} are unknown, or this processor cannot run them")
        self.kernels: str = library.ll_kernels().decode()
        for name, arguments in SIGNATURES:
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
            setattr(self, name, function)


def library_path() -> Path:
    """Return where the built library lies.

    Raises:
        NativeUnavailable: it was not built.
    """
    found = sorted(Path(__file__).parent.glob("kernels*.so")) + sorted(
        Path(__file__).parent.glob("kernels*.pyd")
    )
    if not found:
        raise NativeUnavailable(
            "the C kernels were not built; install a C compiler (gcc or clang) and install the package again"
        )
    return found[0]


def scratch_bytes(m: int, k: int) -> int:
    """Scratch that a quantised linear needs for m rows of k activations."""
    return m * (k + 8 * (k // QBLOCK))
