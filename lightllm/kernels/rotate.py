"""Rotary positions applied to heads in place. Plain version: ref.rotate_.

(a, b) -> (a cos - b sin, b cos + a sin) for the two halves of what is rotated, https://arxiv.org/abs/2104.09864.
One program per token and block of heads; float32 inside, the head dimension contiguous.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK_HEADS = 8


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    num_heads,
    half,
    x_token,
    x_head,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pairs = tl.arange(0, BLOCK_HALF)
    in_half = pairs < half
    mask = (heads < num_heads)[:, None] & in_half[None, :]
    place = x + token * x_token + heads[:, None] * x_head + pairs[None, :]
    c = tl.load(cos + token * half + pairs, in_half, other=0.0)[None, :]
    s = tl.load(sin + token * half + pairs, in_half, other=0.0)[None, :]
    a = tl.load(place, mask, other=0.0).to(tl.float32)
    b = tl.load(place + half, mask, other=0.0).to(tl.float32)
    tl.store(place, (a * c - b * s).to(x.dtype.element_ty), mask)
    tl.store(place + half, (b * c + a * s).to(x.dtype.element_ty), mask)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate heads [n, num_heads, head_dim] in place by cos, sin: [n, rotary_dim / 2] float32, contiguous."""
    num_tokens, num_heads = x.shape[:2]
    half = cos.shape[1]
    if not num_tokens:
        return
    grid = (num_tokens, triton.cdiv(num_heads, BLOCK_HEADS))
    _rotate_kernel[grid](
        x,
        cos,
        sin,
        num_heads,
        half,
        x.stride(0),
        x.stride(1),
        BLOCK_HEADS=BLOCK_HEADS,
        BLOCK_HALF=triton.next_power_of_2(half),
        num_warps=4,
    )
