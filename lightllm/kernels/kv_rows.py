"""Rows of KV from one place to another: out of slots, into slots, from a peer's slots. Plain: ref.copy_rows.

target[t, target_slots[i]] = source[t, source_slots[i]] for all tensors t and n rows; a side without slots is
packed, row i being i. A row is contiguous, words of one integer type, and may be a part of a longer one. One
program copies tiles of some rows of one tensor, one after the other: no more of them than MAX_PROGRAMS, which
is enough for the bandwidth of a link and leaves most of the GPU to the steps that run meanwhile.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 16 * 1024
MAX_PROGRAMS = 64
NUM_WARPS = 4


@triton.jit(do_not_specialize=["count", "num_tensors", "source_rows", "target_rows"])
def _copy_rows_kernel(
    source,
    target,
    source_slots,
    target_slots,
    count,
    num_tensors,
    source_rows,
    target_rows,
    ROW: tl.constexpr,
    SOURCE_STRIDE: tl.constexpr,
    TARGET_STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    HAS_SOURCE_SLOTS: tl.constexpr,
    HAS_TARGET_SLOTS: tl.constexpr,
    IS_ADDRESS: tl.constexpr,
):
    if IS_ADDRESS:
        source = source.to(tl.pointer_type(target.dtype.element_ty))
    num_row_blocks = tl.cdiv(count, BLOCK_ROWS)
    num_word_blocks: tl.constexpr = (ROW + BLOCK_WORDS - 1) // BLOCK_WORDS
    num_tiles = num_tensors * num_row_blocks * num_word_blocks
    tile = tl.program_id(0)
    while tile < num_tiles:
        words = tile % num_word_blocks * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
        block = tile // num_word_blocks
        tensor = (block // num_row_blocks).to(tl.int64)
        rows = block % num_row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = rows < count
        read, written = rows.to(tl.int64), rows.to(tl.int64)
        if HAS_SOURCE_SLOTS:
            read = tl.load(source_slots + rows, in_rows, other=0)
        if HAS_TARGET_SLOTS:
            written = tl.load(target_slots + rows, in_rows, other=0)
        mask = in_rows[:, None] & (words < ROW)[None, :]
        read = (tensor * source_rows + read)[:, None] * SOURCE_STRIDE + words[None, :]
        written = (tensor * target_rows + written)[:, None] * TARGET_STRIDE + words[None, :]
        tl.store(target + written, tl.load(source + read, mask, other=0), mask)
        tile += tl.num_programs(0)


def copy_rows(
    source: Tensor, source_slots: Tensor | None, target: Tensor, target_slots: Tensor | None
) -> None:
    """target[:, target_slots] = source[:, source_slots], for n rows.

    Args:
        source: [num_tensors, num_source_rows, row] of an integer type; contiguous, or the same columns of
            all rows of what is.
        source_slots: [n] int64; None: its n rows in their order.
        target: [num_tensors, num_target_rows, row] of the same type, as `source`, changed in place.
        target_slots: [n] int64, none twice; None: its first n rows.
    """
    count = source.shape[1] if source_slots is None else len(source_slots)
    if count:
        grid, arguments = _call(
            source, source.shape[1], source.stride(1), source_slots, target, target_slots, count
        )
        _copy_rows_kernel[grid](*arguments, num_warps=NUM_WARPS)


def prepare_pull(
    address: int,
    num_rows: int,
    stride: int,
    source_slots: Tensor,
    target: Tensor,
    target_slots: Tensor | None,
) -> Callable[[], None]:
    """As `copy_rows`, from memory that is not a tensor of this process, in two steps.

    Args:
        address: of the first row of [num_tensors, num_rows, stride], readable by the device of `target`, of
            its type; words of it that stand behind a row of `target` are left out.

    Returns:
        What launches the kernel on the stream that is then the current one. Finding the compiled kernel for
        these arguments takes several times as long.
    """
    count = len(source_slots)
    if not count:
        return lambda: None
    grid, arguments = _call(address, num_rows, stride, source_slots, target, target_slots, count)
    if not isinstance(_copy_rows_kernel, triton.JITFunction):  # it is interpreted: nothing is compiled
        return partial(_copy_rows_kernel[grid], *arguments, num_warps=NUM_WARPS)
    compiled = _copy_rows_kernel.warmup(*arguments, grid=grid, num_warps=NUM_WARPS)
    return partial(compiled[grid], *arguments)


def _call(
    source: Tensor | int,
    source_rows: int,
    source_stride: int,
    source_slots: Tensor | None,
    target: Tensor,
    target_slots: Tensor | None,
    count: int,
) -> tuple[tuple[int, int, int], tuple[object, ...]]:
    """How many programs, and what they are given: one for each parameter of the kernel."""
    num_tensors, target_rows, row = target.shape
    tile = TILE_BYTES // target.element_size()
    block_words = min(triton.next_power_of_2(row), tile)
    block_rows = tile // block_words
    num_tiles = num_tensors * triton.cdiv(count, block_rows) * triton.cdiv(row, block_words)
    arguments = (
        source,
        target,
        target if source_slots is None else source_slots,
        target if target_slots is None else target_slots,
        count,
        num_tensors,
        source_rows,
        target_rows,
        row,
        source_stride,
        target.stride(1),
        block_rows,
        block_words,
        source_slots is not None,
        target_slots is not None,
        isinstance(source, int),
    )
    return (min(num_tiles, MAX_PROGRAMS), 1, 1), arguments


def word_type(row_bytes: int) -> torch.dtype:
    """The widest integer type of which a row is a whole number."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        if row_bytes % dtype.itemsize == 0:
            return dtype
    return torch.uint8
