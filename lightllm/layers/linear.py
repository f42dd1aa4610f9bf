"""Linear layers: one interface, one class for each form in which a weight is kept.

A fused weight (q, k and v; gate and up) is one object here; which checkpoint tensors it is made of is data on
the model class, and putting them together is models/loader.py's work.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from lightllm.weights.base import PackedTensor

# Elements that are unpacked at a time: 1 MiB of float32, which stays in the cache.
TILE_ELEMENTS = 1 << 18


class LinearMethod(ABC):
    """y = x W^T + b.

    Attributes:
        num_bytes: memory of weight and bias.
    """

    num_bytes: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Map [n, in_features] to a new tensor [n, out_features] of the same dtype."""

    @abstractmethod
    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of W as a new tensor [n, in_features] in the compute dtype: an embedding lookup."""


class DenseLinear(LinearMethod):
    """A weight in the compute dtype.

    Args:
        weight: [out_features, in_features].
        bias: [out_features], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def rows(self, indices: Tensor) -> Tensor:
        return functional.embedding(indices, self.weight)


class PackedLinear(LinearMethod):
    """A weight that stays quantised as its file has it, and is unpacked tile by tile whenever it is used.

    Needs little memory and much time; the oracle of kernels that compute on packed weights.

    Args:
        parts: blocks of rows, one below the other, each with a packing of its own.
        bias: [out_features] in the compute dtype, or None.
        dtype: to compute in.
    """

    def __init__(self, parts: tuple[PackedTensor, ...], bias: Tensor | None, dtype: torch.dtype) -> None:
        self.parts = parts
        self.bias = bias
        self.dtype = dtype
        self.num_bytes = sum(part.data.nbytes for part in parts) + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], sum(part.shape[0] for part in self.parts), dtype=self.dtype)
        start = 0
        for part in self.parts:
            for tile in unpack_tiles(part):
                end = start + tile.shape[0]
                out[:, start:end] = functional.linear(x, tile.to(self.dtype))
                start = end
        return out if self.bias is None else out.add_(self.bias)

    def rows(self, indices: Tensor) -> Tensor:
        (part,) = self.parts  # a table to look things up in is never fused
        looked_up = PackedTensor(part.type, part.data[indices], (len(indices), part.shape[1]))
        return looked_up.dequantize().to(self.dtype)


def unpack_tiles(packed: PackedTensor) -> Iterator[Tensor]:
    """Yield all rows in order as float32 tensors [some rows, columns], each about TILE_ELEMENTS large."""
    num_rows, num_columns = packed.shape
    step = max(1, TILE_ELEMENTS // num_columns)
    for start in range(0, num_rows, step):
        yield packed.dequantize(slice(start, start + step))


def stack_rows(parts: list[PackedTensor]) -> tuple[PackedTensor, ...]:
    """Put packed tensors of equal width one below the other: neighbours of the same packing become one."""
    stacked: list[list[PackedTensor]] = []
    for part in parts:
        if stacked and stacked[-1][0].type == part.type:
            stacked[-1].append(part)
        else:
            stacked.append([part])
    return tuple(run[0] if len(run) == 1 else _concatenate(run) for run in stacked)


def _concatenate(parts: list[PackedTensor]) -> PackedTensor:
    num_rows = sum(part.shape[0] for part in parts)
    return PackedTensor(
        parts[0].type, torch.cat([part.data for part in parts]), (num_rows, parts[0].shape[1])
    )
