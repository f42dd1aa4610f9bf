"""One new token per sequence attends to its KV in the token-granular pool.

Plain version: ref.paged_attention.

The query heads that share a KV head are computed together, as the rows of one small matrix product, so that
keys and values are read once. A sequence is cut into `num_splits` ranges of keys computed by different
programs, whose results are merged by their log-sum-exp (FlashDecoding; https://arxiv.org/abs/2205.14135,
section 3.1). Grid: (num_kv_heads, n, num_splits): neighbours read neighbouring heads of the same slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm.kernels.dependent_launch import launch_options, start, wait

LOG2_E = 1.4426950408889634
BLOCK_N = 64


@triton.jit
def soft_cap(scores, cap):  # noqa: ANN201
    """cap * tanh(scores / cap)."""
    return cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)


@triton.jit(do_not_specialize=["num_splits"])
def _decode_kernel(
    q,
    pool_k,
    pool_v,
    slot_table,
    tokens,
    rows,
    seq_lens,
    out,
    partial,
    logsumexp,
    num_splits,
    table_width,
    q_token,
    q_head,
    slot_stride,
    out_token,
    scale,
    window,
    cap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start(IS_DEPENDENT)
    wait(IS_DEPENDENT)
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.load(tokens + sequence).to(tl.int64)
    row = tl.load(rows + sequence).to(tl.int64)
    seq_len = tl.load(seq_lens + sequence)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(seq_len - window, 0)
    begin = first
    stop = seq_len
    if IS_SPLIT:
        num_blocks = tl.cdiv(tl.cdiv(seq_len - first, BLOCK_N), num_splits)
        begin = first + split * num_blocks * BLOCK_N
        stop = tl.minimum(begin + num_blocks * BLOCK_N, seq_len)

    heads = tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    in_dims = dims < HEAD_DIM
    q_mask = (heads < GROUP)[:, None] & in_dims[None, :]
    head = kv_head * GROUP + heads
    queries = tl.load(q + token * q_token + head[:, None] * q_head + dims[None, :], q_mask, other=0.0)

    best = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    table = slot_table + row * table_width
    pool_k += kv_head * HEAD_DIM
    pool_v += kv_head * HEAD_DIM
    for block in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        positions = block + tl.arange(0, BLOCK_N)
        is_valid = positions < stop
        slots = tl.load(table + positions, is_valid, other=0).to(tl.int64)
        kv_mask = in_dims[None, :] & is_valid[:, None]
        places = slots[:, None] * slot_stride + dims[None, :]
        keys = tl.load(pool_k + places, kv_mask, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if HAS_CAP:
            scores = soft_cap(scores, cap)
        scores = tl.where(is_valid[None, :], scores * 1.4426950408889634, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        share = tl.exp2(best - new_best)
        weights = tl.exp2(scores - new_best[:, None])
        total = total * share + tl.sum(weights, 1)
        values = tl.load(pool_v + places, kv_mask, other=0.0)
        acc = acc * share[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        best = new_best

    if IS_SPLIT:
        # An empty range leaves best at -inf, and so its log-sum-exp; its result is 0.
        divisor = tl.where(total > 0.0, total, 1.0)
        at = (sequence * tl.num_programs(0) * GROUP + head) * num_splits + split
        is_head = heads < GROUP
        tl.store(logsumexp + at, best + tl.log2(divisor), is_head)
        tl.store(
            partial + at[:, None].to(tl.int64) * HEAD_DIM + dims[None, :],
            acc / divisor[:, None],
            q_mask,
        )
    else:
        place = out + token * out_token + head[:, None] * HEAD_DIM + dims[None, :]
        tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), q_mask)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    partial,
    logsumexp,
    tokens,
    out,
    num_splits,
    out_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start(IS_DEPENDENT)
    wait(IS_DEPENDENT)
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    token = tl.load(tokens + sequence).to(tl.int64)
    at = (sequence * tl.num_programs(0) + head) * num_splits
    dims = tl.arange(0, BLOCK_D)
    in_dims = dims < HEAD_DIM
    # The first range is never empty, so that `best` is finite from then on.
    best = tl.load(logsumexp + at)
    total = 1.0
    acc = tl.load(partial + at.to(tl.int64) * HEAD_DIM + dims, in_dims, other=0.0)
    for split in range(1, num_splits):
        weight = tl.load(logsumexp + at + split)
        new_best = tl.maximum(best, weight)
        kept = tl.exp2(best - new_best)
        share = tl.exp2(weight - new_best)
        place = partial + (at + split).to(tl.int64) * HEAD_DIM + dims
        acc = acc * kept + share * tl.load(place, in_dims, other=0.0)
        total = total * kept + share
        best = new_best
    tl.store(
        out + token * out_token + head * HEAD_DIM + dims, (acc / total).to(out.dtype.element_ty), in_dims
    )


def decode_attention(
    q: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    slot_table: Tensor,
    tokens: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    num_splits: int,
    partial: Tensor | None,
    logsumexp: Tensor | None,
) -> None:
    """Attend for n sequences with one new token each, whose KV is in the pool already.

    Args:
        q: [t, num_q_heads, head_dim], last dimension contiguous.
        pool_k, pool_v: [num_slots, num_kv_heads, head_dim], contiguous.
        slot_table: [num_rows, width] int32.
        tokens: [n] int32, where in q and out the token of each sequence is.
        rows, seq_lens: [n] int32.
        out: [t, num_q_heads * head_dim], contiguous; only these tokens are written.
        scale, window, softcap: see AttentionLayer.
        num_splits: ranges that each sequence is cut into.
        partial, logsumexp: scratch, float32, [n, num_q_heads, num_splits, head_dim] and without the last
            dimension; not read with one split.
    """
    num_kv_heads, head_dim = pool_k.shape[1:]
    group = q.shape[1] // num_kv_heads
    n = rows.shape[0]
    is_split = num_splits > 1
    block_d = triton.next_power_of_2(head_dim)
    _decode_kernel[(num_kv_heads, n, num_splits)](
        q,
        pool_k,
        pool_v,
        slot_table,
        tokens,
        rows,
        seq_lens,
        out,
        partial if is_split else out,
        logsumexp if is_split else out,
        num_splits,
        slot_table.shape[1],
        q.stride(0),
        q.stride(1),
        pool_k.stride(0),
        out.stride(0),
        scale,
        window or 0,
        softcap or 0.0,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_H=max(16, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        BLOCK_N=BLOCK_N,
        IS_SPLIT=is_split,
        HAS_WINDOW=window is not None,
        HAS_CAP=softcap is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        STAGES=3 if q.dtype.itemsize == 2 else 1,
        num_warps=4,
        **launch_options(q, n),
    )
    if is_split:
        _merge_kernel[(q.shape[1], n)](
            partial,
            logsumexp,
            tokens,
            out,
            num_splits,
            out.stride(0),
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            num_warps=1,
            **launch_options(q, n),
        )
