"""Linear layers on the C kernels: weights in the order in which the kernels read them.

`NativeDense` holds float32 weights, `NativePacked` 4-bit and 8-bit ones; activations are float32 and, for the
latter, rounded to 8 bits by blocks of 32 inside the kernel. Both sum each output in an order that does not
depend on the batch. Oracles: DenseLinear and PackedLinear. Runs in the worker.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightllm.layers.linear import LinearMethod
from lightllm.native.library import (
    PANEL,
    QBLOCK,
    QROWS,
    W4_BLOCK_BYTES,
    W8_BLOCK_BYTES,
    NativeLibrary,
    scratch_bytes,
)
from lightllm.weights.base import PackedTensor
from lightllm.weights.codes import Codes4, codes_of


class NativeDense(LinearMethod):
    """A float32 weight in panels of 16 columns of the result.

    Args:
        library: the kernels.
        weight: [out_features, in_features] float32; not kept.
        bias: [out_features] float32, or None.
    """

    def __init__(self, library: NativeLibrary, weight: Tensor, bias: Tensor | None) -> None:
        n, k = weight.shape
        self.library, self.n, self.k, self.bias = library, n, k, bias
        self.panels = torch.empty(-(-n // PANEL), k, PANEL)
        self.panels[n // PANEL :] = 0  # columns that do not exist
        weight = weight.contiguous()
        library.ll_pack_f32(weight.data_ptr(), 0, n, k, self.panels.data_ptr())
        self.num_bytes = self.panels.nbytes + (0 if bias is None else bias.nbytes)
        self._weight, self._bias = self.panels.data_ptr(), _address(bias)

    def __call__(self, x: Tensor) -> Tensor:
        x, m = _rows_of(x), x.shape[0]
        out = torch.empty(m, self.n)
        self.library.ll_linear_f32(
            x.data_ptr(), x.stride(0), self._weight, self._bias, out.data_ptr(), self.n, m, self.k, self.n
        )
        return out

    def rows(self, indices: Tensor) -> Tensor:
        out = torch.empty(len(indices), self.k)
        self.library.ll_rows_f32(self._weight, self.k, indices.data_ptr(), len(indices), out.data_ptr())
        return out


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows [start, start + size) of a packed weight: `bits` a weight, and its blocks."""

    start: int
    size: int
    bits: int
    blocks: Tensor


class NativePacked(LinearMethod):
    """Quantised rows, one part below the other, each of 4 bits (scale and offset) or 8 bits (scale) a weight.

    Exact for Q4_0, Q4_1, Q4_K (up to the rounding of its scales to float16) and Q8_0; what has other codes is
    rounded to 8 bits by blocks of 32, to 1/254 of the largest value of a block.

    Args:
        library: the kernels.
        parts: quantised rows, all with in_features columns, a multiple of 32.
        bias: [out_features] float32, or None.
    """

    def __init__(self, library: NativeLibrary, parts: Iterable[PackedTensor], bias: Tensor | None) -> None:
        self.library, self.bias = library, bias
        self.parts: list[_Part] = []
        self.n = 0
        for part in parts:
            self.k = part.shape[1]
            self.parts.append(self._pack(part))
            self.n += part.shape[0]
        self.num_bytes = sum(p.blocks.nbytes for p in self.parts) + (0 if bias is None else bias.nbytes)
        offsets = [0 if bias is None else bias[p.start :].data_ptr() for p in self.parts]
        self._calls = [
            (self._function(p), p.blocks.data_ptr(), offset or None, p.start, p.size)
            for p, offset in zip(self.parts, offsets, strict=True)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        x, m = _rows_of(x), x.shape[0]
        out = torch.empty(m, self.n)
        scratch = torch.empty(scratch_bytes(m, self.k), dtype=torch.uint8)
        source, stride, target, k = x.data_ptr(), x.stride(0), out.data_ptr(), self.k
        for function, weight, bias, start, size in self._calls:
            address = target + 4 * start
            function(source, stride, weight, bias, address, self.n, m, k, size, scratch.data_ptr())
        return out

    def rows(self, indices: Tensor) -> Tensor:
        (part,) = self.parts  # a table to look things up in is never fused
        out = torch.empty(len(indices), self.k)
        read = self.library.ll_rows_w4 if part.bits == 4 else self.library.ll_rows_w8
        read(part.blocks.data_ptr(), self.k, indices.data_ptr(), len(indices), out.data_ptr())
        return out

    def _function(self, part: _Part) -> Callable[..., None]:
        return self.library.ll_linear_w4 if part.bits == 4 else self.library.ll_linear_w8

    def _pack(self, packed: PackedTensor) -> _Part:
        n, k = packed.shape
        blocks: Tensor | None = None
        first, bits = 0, 8
        for codes in codes_of(packed):
            if blocks is None:
                bits = 4 if isinstance(codes, Codes4) else 8
                size = W4_BLOCK_BYTES if bits == 4 else W8_BLOCK_BYTES
                blocks = torch.empty(-(-n // QROWS), k // QBLOCK, size, dtype=torch.uint8)
                blocks[n // QROWS :] = 0  # rows that do not exist
            count = codes.q.shape[0]
            if isinstance(codes, Codes4):
                addresses = (codes.q.data_ptr(), codes.d.data_ptr(), codes.m.data_ptr())
                self.library.ll_pack_w4(*addresses, first, count, k, blocks.data_ptr())
            else:
                addresses8 = (codes.q.data_ptr(), codes.d.data_ptr())
                self.library.ll_pack_w8(*addresses8, first, count, k, blocks.data_ptr())
            first += count
        assert blocks is not None, "a linear without rows"
        return _Part(self.n, n, bits, blocks)


def _rows_of(x: Tensor) -> Tensor:
    """The activations with neighbouring columns; rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
