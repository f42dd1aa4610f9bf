"""Unpack quantised GGUF blocks into float32, for every packing in `UNPACKERS`.

Pure functions on CPU tensors, a few vectorised passes over chunks that stay in the cache; torch releases the
GIL, so several threads may unpack different tensors at once. This is also the oracle for packed kernels.
Packings: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (d: scale, m: minimum, q: numbers).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from lightllm.weights.gguf import BLOCK_LAYOUTS

# Elements unpacked at a time: 1 MiB of float32.
CHUNK_ELEMENTS = 1 << 18


def dequantize(kind: str, data: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack rows of blocks.

    Args:
        kind: a key of `UNPACKERS`.
        data: [rows, bytes_per_row] uint8, CPU; not modified.
        columns: elements in a row.

    Returns:
        A new tensor [rows, columns], float32.
    """
    layout = BLOCK_LAYOUTS[kind]
    unpack = UNPACKERS[kind]
    out = torch.empty(data.shape[0], columns, dtype=torch.float32)
    blocks = data.reshape(-1, layout.block_bytes)
    values = out.view(-1, layout.block_size)
    step = CHUNK_ELEMENTS // layout.block_size
    for start in range(0, blocks.shape[0], step):
        unpack(blocks[start : start + step], values[start : start + step])
    return out


def _halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte `start` of every block, as float32 [n, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Low nibbles of [n, 16] into the first 16 columns of `out` [n, 32], high ones into the others."""
    out[:, :16].copy_(packed & 0xF)
    out[:, 16:].copy_(packed >> 4)
    return out


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """Single bits of [n, k] bytes, least significant first: [n, 8 * k] uint8."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[:, :, None] >> shifts) & 1).flatten(1)


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, 2:], out).sub_(8).mul_(_halves(blocks, 0))


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    torch.addcmul(_halves(blocks, 2), _nibbles(blocks[:, 4:], out), _halves(blocks, 0), out=out)


def _q5_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, 6:], out).add_(_bits(blocks[:, 2:6]), alpha=16).sub_(16).mul_(_halves(blocks, 0))


def _q5_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    q = _nibbles(blocks[:, 8:], out).add_(_bits(blocks[:, 4:8]), alpha=16)
    torch.addcmul(_halves(blocks, 2), q, _halves(blocks, 0), out=out)


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_halves(blocks, 0))


# ---------------------------------------------------------------- K-quants: 256 elements, scales per 16 or 32


def _pairs(packed: torch.Tensor) -> torch.Tensor:
    """Two-bit numbers of [n, 64] bytes as [n, 2, 4, 32] uint8; the lowest bits come first."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return (packed.view(-1, 2, 1, 32) >> shifts) & 3


def k_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight 6-bit scales and minima from [n, 12] bytes (Q4_K, Q5_K): two tensors [n, 8] uint8."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (rest & 0xF) | ((first >> 6) << 4)], 1)
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 6) << 4)], 1)
    return scales, minima


def _affine(out: torch.Tensor, d: torch.Tensor, m: torch.Tensor) -> None:
    """In place: out = d * out - m, with [n, groups] scales for the groups of each row."""
    out.view(out.shape[0], d.shape[1], -1).mul_(d[:, :, None]).sub_(m[:, :, None])


def _q2_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scales = blocks[:, :16]
    out.view(-1, 2, 4, 32).copy_(_pairs(blocks[:, 16:80]))
    _affine(out, _halves(blocks, 80) * (scales & 0xF), _halves(blocks, 82) * (scales >> 4))


def _q3_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    packed = blocks[:, 96:108]
    low = torch.cat([packed[:, :8] & 0xF, packed[:, :8] >> 4], 1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = ((packed[:, None, 8:] >> shifts) & 3).flatten(1)
    scales = (low | (high << 4)).float().sub_(32).mul_(_halves(blocks, 108))
    bit = torch.arange(8, dtype=torch.uint8).view(2, 4, 1)
    third = (blocks[:, None, None, :32] >> bit) & 1
    # The third bit is stored inverted: where it is missing, four is subtracted.
    out.view(-1, 2, 4, 32).copy_(_pairs(blocks[:, 32:96]) | (third << 2)).sub_(4)
    out.view(-1, 16, 16).mul_(scales[:, :, None])


def _q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scales, minima = k_scales(blocks[:, 4:16])
    packed = blocks[:, 16:].view(-1, 4, 32)
    groups = out.view(-1, 4, 2, 32)
    groups[:, :, 0].copy_(packed & 0xF)
    groups[:, :, 1].copy_(packed >> 4)
    _affine(out, _halves(blocks, 0) * scales, _halves(blocks, 2) * minima)


def _q5_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scales, minima = k_scales(blocks[:, 4:16])
    packed = blocks[:, 48:].view(-1, 4, 32)
    groups = out.view(-1, 4, 2, 32)
    groups[:, :, 0].copy_(packed & 0xF)
    groups[:, :, 1].copy_(packed >> 4)
    bit = torch.arange(8, dtype=torch.uint8).view(4, 2, 1)
    groups.add_((blocks[:, None, None, 16:48] >> bit) & 1, alpha=16)
    _affine(out, _halves(blocks, 0) * scales, _halves(blocks, 2) * minima)


def _q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    low = blocks[:, :128].view(-1, 2, 1, 64)
    low = torch.cat([low & 0xF, low >> 4], 2).view(-1, 2, 4, 32)
    scales = blocks[:, 192:208].view(torch.int8) * _halves(blocks, 208)
    out.view(-1, 2, 4, 32).copy_(low | (_pairs(blocks[:, 128:192]) << 4)).sub_(32)
    out.view(-1, 16, 16).mul_(scales[:, :, None])


# ---------------------------------------------------------------- 4 bits that choose from 16 uneven levels

_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _levels(packed: torch.Tensor, out: torch.Tensor) -> None:
    """The levels that nibbles of [n, 16] bytes choose, into `out` [n, 32]; low nibbles come first."""
    table = torch.tensor(_LEVELS, dtype=torch.float32)
    out[:, :16].copy_(table[(packed & 0xF).int()])
    out[:, 16:].copy_(table[(packed >> 4).int()])


def _iq4_nl(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _levels(blocks[:, 2:], out)
    out.mul_(_halves(blocks, 0))


def _iq4_xs(blocks: torch.Tensor, out: torch.Tensor) -> None:
    low = torch.stack([blocks[:, 4:8] & 0xF, blocks[:, 4:8] >> 4], 2).flatten(1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    high = ((blocks[:, 2:4, None] >> shifts) & 3).flatten(1)
    scales = (low | (high << 4)).float().sub_(32).mul_(_halves(blocks, 0))  # [n, 8]
    _levels(blocks[:, 8:].reshape(-1, 16), out.view(-1, 32))
    out.view(-1, 8, 32).mul_(scales[:, :, None])


UNPACKERS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], None]] = MappingProxyType(
    {
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8_0,
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
        "IQ4_NL": _iq4_nl,
        "IQ4_XS": _iq4_xs,
    }
)
