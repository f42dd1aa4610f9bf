"""New keys and values into their slots, with rotary positions on the way. Plain: ref.rotate_, ref.kv_write.

One program per token and block of heads of q, k or v: q is rotated in place, k is rotated into its slot, v is
copied. Float32 inside, the head dimension contiguous. Without angles only k and v are copied.
"""

import triton
import triton.language as tl
from torch import Tensor

from lightllm.kernels.dependent_launch import launch_options, start, wait

BLOCK_HEADS = 8


@triton.jit
def _copy(source, target, heads, in_heads, source_head, FIRST, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = FIRST + tl.arange(0, BLOCK_D)
    mask = in_heads[:, None] & (dims < HEAD_DIM)[None, :]
    value = tl.load(source + heads[:, None] * source_head + dims[None, :], mask, other=0.0)
    tl.store(target + heads[:, None] * HEAD_DIM + dims[None, :], value, mask)


@triton.jit
def _rotate(
    source, target, heads, in_heads, source_head, target_head, cos, sin, half, BLOCK_HALF: tl.constexpr
):
    pairs = tl.arange(0, BLOCK_HALF)
    in_half = pairs < half
    mask = in_heads[:, None] & in_half[None, :]
    c = tl.load(cos + pairs, in_half, other=0.0)[None, :]
    s = tl.load(sin + pairs, in_half, other=0.0)[None, :]
    place = source + heads[:, None] * source_head + pairs[None, :]
    a = tl.load(place, mask, other=0.0).to(tl.float32)
    b = tl.load(place + half, mask, other=0.0).to(tl.float32)
    place = target + heads[:, None] * target_head + pairs[None, :]
    tl.store(place, (a * c - b * s).to(target.dtype.element_ty), mask)
    tl.store(place + half, (b * c + a * s).to(target.dtype.element_ty), mask)


@triton.jit
def _kv_write_kernel(
    q,
    k,
    v,
    pool_k,
    pool_v,
    slots,
    cos,
    sin,
    num_q_heads,
    num_kv_heads,
    half,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    IS_ROTATING: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start(IS_DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    num_kv_blocks = tl.cdiv(num_kv_heads, BLOCK_HEADS)
    lanes = tl.arange(0, BLOCK_HEADS)
    wait(IS_DEPENDENT)
    slot = tl.load(slots + token) * num_kv_heads * HEAD_DIM
    if block < num_kv_blocks:
        heads = block * BLOCK_HEADS + lanes
        in_heads = heads < num_kv_heads
        source, target = k + token * k_token, pool_k + slot
        if IS_ROTATING:
            angles = token * half
            _rotate(
                source,
                target,
                heads,
                in_heads,
                k_head,
                HEAD_DIM,
                cos + angles,
                sin + angles,
                half,
                BLOCK_HALF,
            )
            if IS_PARTIAL:
                _copy(source, target, heads, in_heads, k_head, 2 * half, HEAD_DIM, BLOCK_D)
        else:
            _copy(source, target, heads, in_heads, k_head, 0, HEAD_DIM, BLOCK_D)
    elif block < 2 * num_kv_blocks:
        heads = (block - num_kv_blocks) * BLOCK_HEADS + lanes
        _copy(v + token * v_token, pool_v + slot, heads, heads < num_kv_heads, v_head, 0, HEAD_DIM, BLOCK_D)
    else:
        heads = (block - 2 * num_kv_blocks) * BLOCK_HEADS + lanes
        place = q + token * q_token
        angles = token * half
        _rotate(
            place,
            place,
            heads,
            heads < num_q_heads,
            q_head,
            q_head,
            cos + angles,
            sin + angles,
            half,
            BLOCK_HALF,
        )


def kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    slots: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
) -> None:
    """pool[slots[i]] = x[i] for keys and values, with q in place and keys rotated if there are angles.

    Args:
        q: [n, num_q_heads, head_dim], heads contiguous; not touched without angles.
        k, v: [n, num_kv_heads, head_dim], heads contiguous.
        pool_k, pool_v: [num_slots, num_kv_heads, head_dim], contiguous, changed in place.
        slots: [n] int64; only padding (slot 0) may occur twice.
        rotary: cosines and sines [n, rotary_dim / 2] float32, contiguous; None: rotated already.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    if not num_tokens:
        return
    half = 0 if rotary is None else rotary[0].shape[1]
    cos, sin = (k, k) if rotary is None else rotary
    num_blocks = 2 * triton.cdiv(num_kv_heads, BLOCK_HEADS)
    if rotary is not None:
        num_blocks += triton.cdiv(q.shape[1], BLOCK_HEADS)
    _kv_write_kernel[(num_tokens, num_blocks)](
        q,
        k,
        v,
        pool_k,
        pool_v,
        slots,
        cos,
        sin,
        q.shape[1],
        num_kv_heads,
        half,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_HALF=triton.next_power_of_2(max(1, half)),
        BLOCK_HEADS=BLOCK_HEADS,
        IS_ROTATING=rotary is not None,
        IS_PARTIAL=2 * half < head_dim,
        num_warps=4,
        **launch_options(k, num_tokens),
    )
