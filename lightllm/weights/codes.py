"""Quantised tensors as plain codes and scales by blocks of 32: what kernels on packed weights start from.

A packing whose codes have this form keeps them; any other is rounded to 8 bits. Float tensors can be rounded
to the same forms (`--quant_type`). Knows packings, not kernels or models. Runs in the worker.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lightllm.weights.base import PackedTensor
from lightllm.weights.dequant import k_scales

BLOCK = 32
# Elements taken at a time: a few MiB of temporary memory.
TILE_ELEMENTS = 1 << 20
FIT_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Codes4:
    """w = d * q + m with q in 0..15.

    Attributes:
        q: [rows, columns / 2] uint8; byte i of the 16 bytes of a block has column i in its low half and
            column 16 + i in its high half.
        d, m: [rows, columns / 32] float16.
    """

    q: Tensor
    d: Tensor
    m: Tensor

    def dequantize(self) -> Tensor:
        """The weights, [rows, columns] float32."""
        blocks = self.q.view(self.q.shape[0], -1, 16)
        codes = torch.cat((blocks & 15, blocks >> 4), dim=-1)
        return torch.addcmul(self.m[..., None].float(), codes, self.d[..., None].float()).flatten(1)


@dataclass(frozen=True, slots=True)
class Codes8:
    """w = d * q.

    Attributes:
        q: [rows, columns] int8.
        d: [rows, columns / 32] float16.
    """

    q: Tensor
    d: Tensor

    def dequantize(self) -> Tensor:
        """The weights, [rows, columns] float32."""
        return (self.q.view(self.q.shape[0], -1, BLOCK) * self.d[..., None].float()).flatten(1)


def codes_of(packed: PackedTensor) -> Iterator[Codes4 | Codes8]:
    """Yield the rows of a tensor in order, some at a time, all of one class."""
    num_rows, num_columns = packed.shape
    step = max(1, TILE_ELEMENTS // num_columns)
    convert = CONVERTERS.get(packed.type)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        if convert is not None:
            yield convert(packed.data[rows])
        else:
            yield quantize8(packed.dequantize(rows))


def quantize8(weights: Tensor) -> Codes8:
    """Round [rows, columns] float32 to 8 bits by blocks of 32 columns."""
    blocks = weights.view(weights.shape[0], -1, BLOCK)
    d = (blocks.abs().amax(-1) / 127).half()
    return Codes8(_rounded(blocks, d, torch.zeros_like(d), -127, 127).to(torch.int8).flatten(1), d)


def quantize4(weights: Tensor) -> Codes4:
    """Round [rows, columns] float32 to 4 bits, by blocks of 32 columns.

    Codes reach from the smallest to the largest of a block at first; then scale and offset are fitted to the
    codes by least squares, and the codes rounded again, in turns (the squared error falls by 15 % on normal
    weights; more rounds bring little).
    """
    blocks = weights.view(weights.shape[0], -1, BLOCK)
    m = blocks.amin(-1).half()
    d = ((blocks.amax(-1) - m.float()) / 15).half()
    codes = _rounded(blocks, d, m, 0, 15)
    mean = blocks.mean(-1, keepdim=True)
    centred = blocks - mean
    for _ in range(FIT_ROUNDS):
        d, m = _fitted(centred, mean.squeeze(-1), codes)
        codes = _rounded(blocks, d, m, 0, 15)
    return Codes4(_paired(codes.to(torch.uint8)).flatten(1), d, m)


def _fitted(centred: Tensor, mean: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset [rows, blocks] float16 with which codes come nearest to blocks, given less their mean."""
    mean_code = codes.mean(-1)
    spread = (codes * codes).sum(-1) - BLOCK * mean_code * mean_code
    d = torch.where(spread > 0, (codes * centred).sum(-1) / spread, 0.0).half()
    return d, (mean - d.float() * mean_code).half()


def _rounded(blocks: Tensor, d: Tensor, m: Tensor, low: int, high: int) -> Tensor:
    """The codes q, as float32, with which d * q + m is nearest to [rows, blocks, 32].

    Multiplies, because torch divides by a broadcast tensor at a tenth of the speed.
    """
    inverse = torch.where(d > 0, 1.0 / d.float(), 0.0)
    return (blocks - m[..., None].float()).mul_(inverse[..., None]).round_().clamp_(low, high)


def _paired(codes: Tensor) -> Tensor:
    """Codes [rows, blocks, 32] uint8 as the bytes of Codes4, [rows, blocks, 16]."""
    return codes[..., :16] | (codes[..., 16:] << 4)


def _half(data: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, [rows, blocks]."""
    return data[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _q4_0(data: Tensor) -> Codes4:
    blocks = data.view(data.shape[0], -1, 18)
    d = _half(blocks, 0)
    return Codes4(blocks[..., 2:].flatten(1).contiguous(), d, d * -8)


def _q4_1(data: Tensor) -> Codes4:
    blocks = data.view(data.shape[0], -1, 20)
    return Codes4(blocks[..., 4:].flatten(1).contiguous(), _half(blocks, 0), _half(blocks, 2))


def _q8_0(data: Tensor) -> Codes8:
    blocks = data.view(data.shape[0], -1, 34)
    return Codes8(blocks[..., 2:].flatten(1).contiguous().view(torch.int8), _half(blocks, 0))


def _q4_k(data: Tensor) -> Codes4:
    """Blocks of 256: 32 bytes hold 32 weights in their low halves and the next 32 in their high halves."""
    rows = data.shape[0]
    blocks = data.view(-1, 144)
    scales, minima = k_scales(blocks[:, 4:16])
    d = (_half(blocks, 0)[:, None].float() * scales).half().view(rows, -1)
    m = (_half(blocks, 2)[:, None].float() * -minima.float()).half().view(rows, -1)
    packed = blocks[:, 16:].view(-1, 4, 1, 32)
    codes = torch.cat((packed & 15, packed >> 4), dim=2).view(rows, -1, BLOCK)
    return Codes4(_paired(codes).flatten(1), d, m)


CONVERTERS: Mapping[str, Callable[[Tensor], Codes4 | Codes8]] = MappingProxyType(
    {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k, "Q8_0": _q8_0}
)
