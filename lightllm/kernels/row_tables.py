"""The tables of rows on the device: write diffs, gather a step's inputs, append sampled tokens.

Plain versions: ref.scatter_table, ref.gather_inputs, ref.append_tokens. All tables are [num_rows, width]
int32, contiguous.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit(do_not_specialize=["count", "offset"])
def _scatter_kernel(table, packed, count, width, offset, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    row = tl.load(packed + offset + i, mask, other=0).to(tl.int64)
    position = tl.load(packed + offset + count + i, mask, other=0)
    value = tl.load(packed + offset + 2 * count + i, mask, other=0)
    tl.store(table + row * width + position, value, mask)


@triton.jit(do_not_specialize=["count"])
def _gather_kernel(
    token_table, slot_table, rows, positions, ids, out_slots, out_positions, count, width, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    row = tl.load(rows + i, mask, other=0).to(tl.int64)
    position = tl.load(positions + i, mask, other=0)
    place = row * width + position
    tl.store(ids + i, tl.load(token_table + place, mask, other=0).to(tl.int64), mask)
    tl.store(out_slots + i, tl.load(slot_table + place, mask, other=0).to(tl.int64), mask)
    tl.store(out_positions + i, position.to(tl.int64), mask)


@triton.jit(do_not_specialize=["count"])
def _append_kernel(token_table, rows, lengths, token_ids, count, width, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    row = tl.load(rows + i, mask, other=0).to(tl.int64)
    length = tl.load(lengths + i, mask, other=0)
    value = tl.load(token_ids + i, mask, other=0).to(tl.int32)
    tl.store(token_table + row * width + length, value, mask)


def scatter_table(table: Tensor, packed: Tensor, offset: int, count: int) -> None:
    """table[row, position] = value for `count` triples.

    Args:
        packed: int32; from `offset` on the rows, then the positions, then the values.
    """
    if count:
        grid = (triton.cdiv(count, BLOCK),)
        _scatter_kernel[grid](table, packed, count, table.shape[1], offset, BLOCK=BLOCK)


def gather_inputs(
    token_table: Tensor,
    slot_table: Tensor,
    rows: Tensor,
    positions: Tensor,
    ids: Tensor,
    out_slots: Tensor,
    out_positions: Tensor,
) -> None:
    """Look up token id and slot of n places, and widen the positions.

    Args:
        rows, positions: [n] int32.
        ids, out_slots, out_positions: [n] int64, written.
    """
    count = rows.shape[0]
    grid = (triton.cdiv(count, BLOCK),)
    _gather_kernel[grid](
        token_table,
        slot_table,
        rows,
        positions,
        ids,
        out_slots,
        out_positions,
        count,
        token_table.shape[1],
        BLOCK=BLOCK,
    )


def append_tokens(token_table: Tensor, rows: Tensor, lengths: Tensor, token_ids: Tensor) -> None:
    """token_table[rows[i], lengths[i]] = token_ids[i]; rows, lengths: [n] int32, token_ids: [n] int64."""
    count = rows.shape[0]
    grid = (triton.cdiv(count, BLOCK),)
    _append_kernel[grid](token_table, rows, lengths, token_ids, count, token_table.shape[1], BLOCK=BLOCK)
