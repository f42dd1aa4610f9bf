"""Several new tokens per sequence attend to their KV in the token-granular pool. Plain: ref.paged_attention.

FlashAttention (https://arxiv.org/abs/2205.14135) over tiles of queries: a tile is BLOCK_M / group tokens of
one sequence times the `group` query heads that share a KV head, so that keys and values serve all of them.
Keys and values of the new tokens are in the pool already. Grid: (num_tiles, num_kv_heads).
"""

import triton
import triton.language as tl
from torch import Tensor

from lightllm.kernels.decode_attention import soft_cap

TILE_FIELDS = 4


@triton.jit
def _attend(
    queries,
    best,
    total,
    acc,
    table,
    pool_k,
    pool_v,
    slot_stride,
    start,
    stop,
    last_key,
    first_key,
    scale,
    cap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Fold the keys [start, stop) into the running softmax; with IS_MASKED only those that a row may see."""
    dims = tl.arange(0, BLOCK_D)
    in_dims = dims < HEAD_DIM
    for block in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        positions = block + tl.arange(0, BLOCK_N)
        if IS_MASKED:
            is_valid = positions < stop
            slots = tl.load(table + positions, is_valid, other=0).to(tl.int64)
            kv_mask = in_dims[None, :] & is_valid[:, None]
        else:
            slots = tl.load(table + positions).to(tl.int64)
            kv_mask = in_dims[None, :] & (positions >= 0)[:, None]
        places = slots[:, None] * slot_stride + dims[None, :]
        keys = tl.load(pool_k + places, kv_mask, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if HAS_CAP:
            scores = soft_cap(scores, cap)
        scores = scores * 1.4426950408889634
        if IS_MASKED:
            is_seen = positions[None, :] <= last_key[:, None]
            if HAS_WINDOW:
                is_seen = is_seen & (positions[None, :] >= first_key[:, None])
            scores = tl.where(is_seen, scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        # A row that has seen nothing yet (window) keeps -inf; its exponent must not become inf - inf.
        shift = tl.where(new_best > -float("inf"), new_best, 0.0)
        share = tl.exp2(best - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * share + tl.sum(weights, 1)
        values = tl.load(pool_v + places, kv_mask, other=0.0)
        acc = acc * share[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
        best = new_best
    return best, total, acc


@triton.jit
def _prefill_kernel(
    q,
    pool_k,
    pool_v,
    slot_table,
    tiles,
    out,
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
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    row = tl.load(tile).to(tl.int64)
    first_token = tl.load(tile + 1).to(tl.int64)
    num_tokens = tl.load(tile + 2)
    first_position = tl.load(tile + 3)

    lanes = tl.arange(0, BLOCK_M)
    token = lanes // GROUP
    head = kv_head * GROUP + lanes % GROUP
    dims = tl.arange(0, BLOCK_D)
    mask = (token < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    place = q + (first_token + token)[:, None] * q_token + head[:, None] * q_head + dims[None, :]
    queries = tl.load(place, mask, other=0.0)
    last_key = first_position + token
    first_key = last_key - window + 1

    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = slot_table + row * table_width
    pool_k += kv_head * HEAD_DIM
    pool_v += kv_head * HEAD_DIM
    stop = first_position + num_tokens
    middle = (first_position + 1) // BLOCK_N * BLOCK_N  # keys that all queries of the tile see
    if HAS_WINDOW:
        middle = tl.maximum(first_position - window + 1, 0)
    else:
        best, total, acc = _attend(
            queries, best, total, acc, table, pool_k, pool_v, slot_stride, 0, middle, last_key, first_key,
            scale, cap, HEAD_DIM, BLOCK_D, BLOCK_N, False, HAS_WINDOW, HAS_CAP, PRECISION, STAGES,
        )  # fmt: skip
    best, total, acc = _attend(
        queries, best, total, acc, table, pool_k, pool_v, slot_stride, middle, stop, last_key, first_key,
        scale, cap, HEAD_DIM, BLOCK_D, BLOCK_N, True, HAS_WINDOW, HAS_CAP, PRECISION, STAGES,
    )  # fmt: skip
    place = out + (first_token + token)[:, None] * out_token + head[:, None] * HEAD_DIM + dims[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask)


def prefill_attention(
    q: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    slot_table: Tensor,
    tiles: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    block_m: int,
) -> None:
    """Attend causally for tiles of new tokens, whose KV is in the pool already.

    Args:
        q: [t, num_q_heads, head_dim], last dimension contiguous.
        pool_k, pool_v: [num_slots, num_kv_heads, head_dim], contiguous.
        slot_table: [num_rows, width] int32.
        tiles: [num_tiles, TILE_FIELDS] int32: row, first token in q, number of tokens (at most
            block_m // group), position of the first.
        out: [t, num_q_heads * head_dim], contiguous; only the tokens of the tiles are written.
        scale, window, softcap: see AttentionLayer.
        block_m: queries of a tile, a power of two of at least 16 and the group.
    """
    num_kv_heads, head_dim = pool_k.shape[1:]
    is_half = q.dtype.itemsize == 2
    _prefill_kernel[(tiles.shape[0], num_kv_heads)](
        q,
        pool_k,
        pool_v,
        slot_table,
        tiles,
        out,
        slot_table.shape[1],
        q.stride(0),
        q.stride(1),
        pool_k.stride(0),
        out.stride(0),
        scale,
        window or 0,
        softcap or 0.0,
        GROUP=q.shape[1] // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_N=64 if is_half else 32,
        HAS_WINDOW=window is not None,
        HAS_CAP=softcap is not None,
        PRECISION="tf32" if is_half else "ieee",
        STAGES=3 if is_half else 1,
        num_warps=4,
    )
