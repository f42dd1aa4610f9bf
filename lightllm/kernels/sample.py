"""Draw one token per row under temperature, top_k, top_p and min_p, without sorting.

Plain version: ref.sample_tokens.

In the order of falling probability each filter keeps a prefix, so all of them keep the shortest one, and the
drawn token is where the cumulative weight passes noise * (weight kept). Both the ends of prefixes and that
place are found by bisection over the bit patterns of the weights exp((logit - max) / temperature), which as
positive floats have the order of integers: 30 passes over a row that lies in the cache. Equal weights have
the order of their ids. Rows without a filter are inverted in the order of ids, in two passes.
One program per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
ONE_BITS = 0x3F800000  # of 1.0, the largest weight


@triton.jit
def _weights(row, start, vocab_size, best, temperature, BLOCK: tl.constexpr):
    ids = start + tl.arange(0, BLOCK)
    mask = ids < vocab_size
    logits = tl.load(row + ids, mask, other=-float("inf"))
    return ids, mask, tl.where(mask, tl.exp((logits - best) / temperature), 0.0)


@triton.jit
def _above(row, vocab_size, best, temperature, bits, BLOCK: tl.constexpr):
    """Number and total weight of the tokens whose weight has at least these bits."""
    # One sum across the program at the end: it costs more than a block's arithmetic.
    counts = tl.zeros([BLOCK], tl.int32)
    masses = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        _ids, mask, weights = _weights(row, start, vocab_size, best, temperature, BLOCK)
        is_above = mask & (weights.to(tl.int32, bitcast=True) >= bits)
        counts += is_above.to(tl.int32)
        masses += tl.where(is_above, weights, 0.0)
    return tl.sum(counts, 0), tl.sum(masses, 0)


@triton.jit
def _threshold(
    row,
    vocab_size,
    best,
    temperature,
    wanted,
    IS_COUNT: tl.constexpr,
    IS_STRICT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest bits whose count (mass) above is at least (IS_STRICT: more than) what is wanted."""
    low = 0
    high = 0x3F800000 + 1
    for _ in range(30):
        middle = (low + high) // 2
        count, mass = _above(row, vocab_size, best, temperature, middle, BLOCK)
        if IS_COUNT:
            is_enough = count >= wanted
        elif IS_STRICT:
            is_enough = mass > wanted
        else:
            is_enough = mass >= wanted
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    return low


@triton.jit
def _nth_of(row, vocab_size, best, temperature, bits, rank, BLOCK: tl.constexpr):
    """The id of the rank-th token, in the order of ids, whose weight has exactly these bits."""
    found = -1
    last = 0
    seen = 0
    for start in range(0, vocab_size, BLOCK):
        ids, mask, weights = _weights(row, start, vocab_size, best, temperature, BLOCK)
        is_equal = (mask & (weights.to(tl.int32, bitcast=True) == bits)).to(tl.int32)
        order = seen + tl.cumsum(is_equal, 0) - 1
        hit = tl.max(tl.where((is_equal == 1) & (order == rank), ids, -1), 0)
        found = tl.maximum(found, hit)
        last = tl.maximum(last, tl.max(tl.where(is_equal == 1, ids, 0), 0))
        seen += tl.sum(is_equal, 0)
    return tl.where(found >= 0, found, last)


@triton.jit
def _invert(row, vocab_size, best, temperature, target, BLOCK: tl.constexpr):
    """The first id at which the cumulative weight exceeds the target; never one of weight zero."""
    found = vocab_size
    last = 0
    before = 0.0
    for start in range(0, vocab_size, BLOCK):
        ids, _mask, weights = _weights(row, start, vocab_size, best, temperature, BLOCK)
        cumulative = before + tl.cumsum(weights, 0)
        is_positive = weights > 0.0
        hit = tl.min(tl.where(is_positive & (cumulative > target), ids, vocab_size), 0)
        found = tl.minimum(found, hit)
        last = tl.maximum(last, tl.max(tl.where(is_positive, ids, 0), 0))
        before += tl.sum(weights, 0)
    return tl.where(found < vocab_size, found, last)


@triton.jit
def _sample_kernel(logits, filters, noises, out, vocab_size, stride, num_rows, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    row = logits + i.to(tl.int64) * stride
    temperature = tl.load(filters + i)
    top_k = tl.load(filters + num_rows + i).to(tl.int32)
    top_p = tl.load(filters + 2 * num_rows + i)
    min_p = tl.load(filters + 3 * num_rows + i)
    noise = tl.load(noises + i)

    best = -float("inf")
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.max(tl.load(row + ids, ids < vocab_size, other=-float("inf")), 0))
    chosen = 0
    if temperature <= 0.0:  # greedy: the first of the largest, which have weight 1 at any temperature
        chosen = _nth_of(row, vocab_size, best, 1.0, 0x3F800000, 0, BLOCK)
    else:
        _count, total = _above(row, vocab_size, best, temperature, 0, BLOCK)
        kept = total
        if (top_k > 0) & (top_k < vocab_size):
            bits = _threshold(row, vocab_size, best, temperature, top_k, True, False, BLOCK)
            count, mass = _above(row, vocab_size, best, temperature, bits + 1, BLOCK)
            kept = tl.minimum(kept, mass + (top_k - count) * bits.to(tl.float32, bitcast=True))
        if top_p < 1.0:
            wanted = top_p * total
            bits = _threshold(row, vocab_size, best, temperature, wanted, False, False, BLOCK)
            _count, mass = _above(row, vocab_size, best, temperature, bits + 1, BLOCK)
            weight = tl.maximum(bits, 1).to(tl.float32, bitcast=True)
            needed = tl.maximum(tl.ceil((wanted - mass) / weight), 1.0)
            kept = tl.minimum(kept, mass + needed * weight)
        if min_p > 0.0:
            _count, mass = _above(row, vocab_size, best, temperature, min_p.to(tl.int32, bitcast=True), BLOCK)
            kept = tl.minimum(kept, mass)
        kept = tl.maximum(kept, 1.0)
        target = noise * kept
        if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
            bits = _threshold(row, vocab_size, best, temperature, target, False, True, BLOCK)
            _count, mass = _above(row, vocab_size, best, temperature, bits + 1, BLOCK)
            weight = tl.maximum(bits, 1).to(tl.float32, bitcast=True)
            rank = tl.maximum((target - mass) / weight, 0.0).to(tl.int32)
            chosen = _nth_of(row, vocab_size, best, temperature, bits, rank, BLOCK)
        else:
            chosen = _invert(row, vocab_size, best, temperature, target, BLOCK)
    tl.store(out + i, chosen.to(tl.int64))


def sample_tokens(logits: Tensor, params: Tensor, noise: Tensor) -> Tensor:
    """Draw one token per row.

    Args:
        logits: [n, vocab_size] float32, rows contiguous.
        params: [4, n] float32: temperature (0: greedy), top_k (0: off), top_p, min_p.
        noise: [n] float32 in [0, 1).

    Returns:
        [n] int64.
    """
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _sample_kernel[(num_rows,)](
        logits,
        params,
        noise,
        out,
        vocab_size,
        logits.stride(0),
        num_rows,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return out
