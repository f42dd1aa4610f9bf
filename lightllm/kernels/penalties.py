"""Repetition, presence and frequency penalties of many rows at once. Plain version: ref.penalise_.

First kernel: count each row's tokens in a table [n, vocab_size] int32, bit 0 for "seen at all", the rest for
how often among the tokens that count. Second: change the logits of what was seen. Nothing is read back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["width"])
def _count_kernel(token_table, spans, counts, width, vocab_size, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    row = tl.load(spans + i * 3).to(tl.int64)
    counted_from = tl.load(spans + i * 3 + 1)
    length = tl.load(spans + i * 3 + 2)
    positions = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = positions < length
    token = tl.load(token_table + row * width + positions, mask, other=0)
    place = counts + i.to(tl.int64) * vocab_size + token
    tl.atomic_or(place, 1, mask)
    tl.atomic_add(place, 2, mask & (positions >= counted_from))


@triton.jit
def _apply_kernel(logits, lines, penalties, counts, vocab_size, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    line = tl.load(lines + i).to(tl.int64)
    repetition = tl.load(penalties + i * 3)
    presence = tl.load(penalties + i * 3 + 1)
    frequency = tl.load(penalties + i * 3 + 2)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = ids < vocab_size
    seen = tl.load(counts + i.to(tl.int64) * vocab_size + ids, mask, other=0)
    count = seen // 2
    value = tl.load(logits + line * stride + ids, mask, other=0.0)
    repeated = tl.minimum(tl.where(value > 0.0, value / repetition, value * repetition), 1e30)
    value = tl.where(seen > 0, repeated, value)
    value -= tl.where(count > 0, frequency * count + presence, 0.0)
    tl.store(logits + line * stride + ids, value, mask)


def penalise_(
    logits: Tensor, lines: Tensor, token_table: Tensor, spans: Tensor, params: Tensor, longest: int
) -> None:
    """Apply the penalties in place.

    Args:
        logits: [m, vocab_size] float32.
        lines: [n] int32, which rows of it.
        token_table: [num_rows, width] int32.
        spans: [n, 3] int32: row of the token table, first position that presence and frequency count, length.
        params: [n, 3] float32: repetition (at least 1e-30), presence and frequency penalty. What repetition
            makes of a logit is cut at 1e30.
        longest: at least the largest length.
    """
    n, vocab_size = lines.shape[0], logits.shape[1]
    counts = torch.zeros(n, vocab_size, dtype=torch.int32, device=logits.device)
    grid = (n, triton.cdiv(longest, BLOCK))
    _count_kernel[grid](token_table, spans, counts, token_table.shape[1], vocab_size, BLOCK=BLOCK)
    grid = (n, triton.cdiv(vocab_size, BLOCK))
    _apply_kernel[grid](logits, lines, params, counts, vocab_size, logits.stride(0), BLOCK=BLOCK)
