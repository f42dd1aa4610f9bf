"""Several new tokens per sequence attend to their KV in the token-granular pool. Plain: ref.paged_attention.

FlashAttention (https://arxiv.org/abs/2205.14135) over tiles of queries: a tile is BLOCK_M / group tokens of
one sequence times the `group` query heads that share a KV head, so that keys and values serve all of them.
Keys and values of the new tokens are in the pool already. Grid: (num_tiles, num_kv_heads).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm.kernels.decode_attention import soft_cap

TILE_FIELDS = 4


class Blocks(NamedTuple):
    """How a program walks along the keys.

    Attributes:
        block_n: keys at a time.
        num_warps: that share the tile.
        num_stages: blocks of keys and values on their way from memory.
    """

    block_n: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, block_m: int, head_dim: int, itemsize: int) -> int:
        """Shared memory of a program: the queries, and all blocks that are on their way."""
        return (block_m + 2 * self.block_n * self.num_stages) * head_dim * itemsize


# For 16 bits; what does not fit is passed over. Large tiles: the first is the fastest on an H100
# (benchmarks/kernels_cuda.py); the order of the others, and of those of small tiles, is not measured.
LARGE_TILE_BLOCKS = (
    Blocks(128, 8, 2),
    Blocks(64, 8, 2),
    Blocks(64, 4, 2),
    Blocks(32, 4, 2),
    Blocks(16, 4, 1),
)
SMALL_TILE_BLOCKS = (Blocks(64, 4, 3), Blocks(64, 4, 2), Blocks(32, 4, 2), Blocks(16, 4, 1))
EXACT_BLOCKS = Blocks(32, 4, 1)


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
    IS_LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Fold the keys [start, stop) into the running softmax; with IS_MASKED only those that a row may see.

    `best` is in units of the products, so that scale and log2(e) cost one operation per score.
    """
    dims = tl.arange(0, BLOCK_D)
    for block in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        positions = block + tl.arange(0, BLOCK_N)
        if IS_MASKED:
            slots = tl.load(table + positions, positions < stop, other=0)  # slot 0 is nobody's
        else:
            slots = tl.load(table + positions)
        if IS_LARGE:
            slots = slots.to(tl.int64)
        places = slots[:, None] * slot_stride + dims[None, :]
        if HEAD_DIM == BLOCK_D:
            keys = tl.load(pool_k + places)
        else:
            keys = tl.load(pool_k + places, (dims < HEAD_DIM)[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if HAS_CAP:
            scores = soft_cap(scores * scale, cap)
            unit = 1.4426950408889634
        else:
            unit = scale * 1.4426950408889634
        if IS_MASKED:
            is_seen = positions[None, :] <= last_key[:, None]
            if HAS_WINDOW:
                is_seen = is_seen & (positions[None, :] >= first_key[:, None])
            scores = tl.where(is_seen, scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        shift = new_best * unit
        if HAS_WINDOW:  # a row that has seen nothing yet keeps -inf: its exponent must not be inf - inf
            shift = tl.where(new_best > -float("inf"), shift, 0.0)
        share = tl.exp2(best * unit - shift)
        weights = tl.exp2(scores * unit - shift[:, None])
        total = total * share + tl.sum(weights, 1)
        if HEAD_DIM == BLOCK_D:
            values = tl.load(pool_v + places)
        else:
            values = tl.load(pool_v + places, (dims < HEAD_DIM)[None, :], other=0.0)
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
    IS_LARGE: tl.constexpr,
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
            scale, cap, HEAD_DIM, BLOCK_D, BLOCK_N, False, HAS_WINDOW, HAS_CAP, IS_LARGE, PRECISION, STAGES,
        )  # fmt: skip
    best, total, acc = _attend(
        queries, best, total, acc, table, pool_k, pool_v, slot_stride, middle, stop, last_key, first_key,
        scale, cap, HEAD_DIM, BLOCK_D, BLOCK_N, True, HAS_WINDOW, HAS_CAP, IS_LARGE, PRECISION, STAGES,
    )  # fmt: skip
    place = out + (first_token + token)[:, None] * out_token + head[:, None] * HEAD_DIM + dims[None, :]
    divisor = tl.where(total > 0.0, total, 1.0)  # a tile may have no tokens
    tl.store(place, (acc / divisor[:, None]).to(out.dtype.element_ty), mask)


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
            block_m // group; may be 0), position of the first.
        out: [t, num_q_heads * head_dim], contiguous; only the tokens of the tiles are written.
        scale, window, softcap: see AttentionLayer; scale is positive.
        block_m: queries of a tile, a power of two of at least 16 and the group.
    """
    num_kv_heads, head_dim = pool_k.shape[1:]
    block_d = triton.next_power_of_2(head_dim)
    is_half = q.dtype.itemsize == 2
    blocks = choose_blocks(block_m, block_d, q.device) if is_half else EXACT_BLOCKS
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
        BLOCK_D=block_d,
        BLOCK_N=blocks.block_n,
        HAS_WINDOW=window is not None,
        HAS_CAP=softcap is not None,
        IS_LARGE=pool_k.numel() >= 2**31,  # places in the pool need 64 bits, which cost 4 %
        PRECISION="tf32" if is_half else "ieee",
        STAGES=blocks.num_stages,
        num_warps=blocks.num_warps,
    )


def choose_blocks(block_m: int, head_dim: int, device: torch.device) -> Blocks:
    """The fastest blocks of 16-bit keys and values that fit into a multiprocessor of the device."""
    options = LARGE_TILE_BLOCKS if block_m >= 128 else SMALL_TILE_BLOCKS
    if device.type != "cuda":
        return options[0]  # interpreted
    limit: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return next((b for b in options if b.shared_bytes(block_m, head_dim, 2) <= limit), options[-1])
