"""Attention on a CPU: reads the pool in place where slots lie together, and copies only short pieces.

A sequence's slots are a few runs of neighbours (allocation gives out regions, and a cached prefix is shared).
One token of a long sequence attends to each long run as a view of the pool and to the rest gathered together;
the partial results are merged by their log-sum-exp, as in FlashAttention. A prompt's chunk attends to itself
without the pool, and to its past in the same way. Short decoding sequences of similar length are gathered and
computed together: many small operations cost more than copying a few tokens.

A sliding window leaves less of a sequence to read, and nothing else changes, except for a prompt's chunk that
reaches beyond it: its tokens see different parts of the past, which takes a mask. A softcap is beyond torch's
flash attention; such layers compute the plain formula in blocks.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightllm.attention.base import AttentionBackend, AttentionLayer
from lightllm.device.forward_batch import ForwardBatch

# Decoding sequences up to this length are gathered and computed together (measured: beyond it views win).
MAX_GATHERED_LEN = 512
# Elements of keys that a group copies at most (8 MiB of float32): bounds memory, and stays in the cache.
MAX_GATHERED_ELEMENTS = 1 << 21
# Shorter runs are gathered: a view of its own costs as much as copying about so many tokens.
MIN_VIEW_LEN = 256
# Scores that a layer with a softcap holds at a time (16 MiB).
MAX_SCORES = 1 << 22


@dataclass(frozen=True, slots=True)
class Run:
    """Slots [start, start + length) of the pool."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """One sequence on its own.

    Attributes:
        start, end: its tokens in the batch.
        is_chunk: several tokens at once: they attend to each other causally, and `pieces` is only the past.
            Otherwise `pieces` is the whole sequence, the new token included.
        pieces: disjoint parts of the sequence, in any order: runs, or the slots of a gathered part as int64.
    """

    start: int
    end: int
    is_chunk: bool
    pieces: tuple[Run | Tensor, ...]


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """b decoding sequences of similar length, padded to the longest, m.

    Attributes:
        tokens: [b] int64, their tokens in the batch.
        kv_rows: [b * num_kv_heads * m] int64, rows of the pool seen as [num_slots * num_kv_heads, head_dim].
        bias: [b * num_kv_heads, 1, m] float32, -inf on padding.
    """

    tokens: Tensor
    kv_rows: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class MaskedPlan:
    """One sequence whose tokens do not all see the same past, or that no flash attention can compute.

    Attributes:
        start, end: its tokens in the batch.
        keys: whatever any of them sees, the new tokens included, in the order of positions.
        bias: [end - start, number of keys] float32, -inf where a token does not see a key.
    """

    start: int
    end: int
    keys: Run | Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Every sequence of the batch is in exactly one of these."""

    groups: tuple[GroupPlan, ...]
    sequences: tuple[SequencePlan, ...]
    masked: tuple[MaskedPlan, ...]


class CpuAttention(AttentionBackend):
    """Built on torch's flash attention for CPUs, which takes strided keys and groups of query heads."""

    name: ClassVar[str] = "torch"

    def plan(self, batch: ForwardBatch) -> dict[tuple[int | None, bool], Plan]:
        """Plans by window and whether there is a softcap, each made by the first layer that needs it."""
        return {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        """See the base class."""
        pool_k, pool_v = batch.kv_pool.k[layer.index], batch.kv_pool.v[layer.index]
        pool_k.index_copy_(0, batch.out_slots, k)
        pool_v.index_copy_(0, batch.out_slots, v)
        plan = _plan_for(layer, batch)
        out = torch.empty(q.shape, dtype=q.dtype)
        for group in plan.groups:
            out.index_copy_(0, group.tokens, _attend_group(q, pool_k, pool_v, group, layer))
        for s in plan.sequences:
            tokens = slice(s.start, s.end)
            parts = []
            if s.is_chunk:
                parts.append(_flash(q[tokens], k[tokens], v[tokens], layer.scale, is_causal=True))
            for piece in s.pieces:
                parts.append(_flash(q[tokens], _read(pool_k, piece), _read(pool_v, piece), layer.scale))
            out[tokens] = _merge(parts)[0].transpose(0, 1)
        for m in plan.masked:
            tokens = slice(m.start, m.end)
            keys, values = _read(pool_k, m.keys), _read(pool_v, m.keys)
            if layer.softcap is None:
                attended, _ = _flash(q[tokens], keys, values, layer.scale, bias=m.bias)
                out[tokens] = attended[0].transpose(0, 1)
            else:
                _attend_capped(q[tokens], keys, values, m.bias, layer, out=out[tokens])
        return out.flatten(1)


def _plan_for(layer: AttentionLayer, batch: ForwardBatch) -> Plan:
    """Return the plan of layers like this one, made on the first call of a step."""
    window = layer.window
    if window is not None and window >= batch.seq_lens.max():
        window = None
    key = (window, layer.softcap is not None)
    if key not in batch.plan:
        batch.plan[key] = make_plan(batch, *key)
    plan: Plan = batch.plan[key]
    return plan


def make_plan(batch: ForwardBatch, window: int | None = None, has_softcap: bool = False) -> Plan:
    """Sort the sequences into groups, masked and other single ones, and find the runs of the latter."""
    num_seen = batch.seq_lens if window is None else np.minimum(batch.seq_lens, window)
    groups = _group(batch, num_seen)
    grouped = {i for members in groups for i in members}
    single = [i for i in range(len(batch.rows)) if i not in grouped]
    masked = [
        i for i in single if has_softcap or (batch.query_lens[i] > 1 and num_seen[i] < batch.seq_lens[i])
    ]
    return Plan(
        groups=tuple(_plan_group(batch, members, num_seen[members]) for members in groups),
        sequences=tuple(_plan_sequence(batch, i, num_seen[i]) for i in single if i not in masked),
        masked=tuple(_plan_masked(batch, i, window) for i in masked),
    )


def _group(batch: ForwardBatch, num_seen: np.ndarray) -> list[list[int]]:
    """Choose sequences to compute together: within a factor of two in length, so that padding stays small."""
    by_size: dict[int, list[int]] = {}
    lengths = zip(num_seen.tolist(), batch.query_lens.tolist(), strict=True)
    for i, (length, query_len) in enumerate(lengths):
        if query_len == 1 and length <= MAX_GATHERED_LEN:
            by_size.setdefault((length - 1).bit_length(), []).append(i)
    groups: list[list[int]] = []
    for bits, members in by_size.items():
        elements = (1 << bits) * batch.kv_pool.num_kv_heads * batch.kv_pool.head_dim
        most = max(2, MAX_GATHERED_ELEMENTS // elements)
        groups += [members[start : start + most] for start in range(0, len(members), most)]
    return [members for members in groups if len(members) > 1]


def _plan_group(batch: ForwardBatch, members: list[int], num_seen: np.ndarray) -> GroupPlan:
    last = batch.seq_lens[members][:, None] - 1
    num_heads = batch.kv_pool.num_kv_heads
    positions = last + 1 - num_seen[:, None] + np.arange(num_seen.max())  # [b, m]
    # Padding repeats the last token, which is always valid to read, and is masked by the bias.
    slots = batch.slot_table[batch.rows[members, None], np.minimum(positions, last)].astype(np.int64)
    kv_rows = slots[:, None, :] * num_heads + np.arange(num_heads)[:, None]  # [b, num_kv_heads, m]
    bias = np.where(positions > last, np.float32(-np.inf), np.float32(0)).repeat(num_heads, axis=0)
    return GroupPlan(
        tokens=torch.from_numpy(batch.cu_seqlens_q[members]),
        kv_rows=torch.from_numpy(kv_rows.reshape(-1)),
        bias=torch.from_numpy(bias[:, None, :]),
    )


def _plan_sequence(batch: ForwardBatch, i: int, num_seen: int) -> SequencePlan:
    is_chunk = batch.query_lens[i] > 1
    seq_len = batch.seq_lens[i]
    num_read = seq_len - (batch.query_lens[i] if is_chunk else 0)
    return SequencePlan(
        start=int(batch.cu_seqlens_q[i]),
        end=int(batch.cu_seqlens_q[i + 1]),
        is_chunk=bool(is_chunk),
        pieces=find_pieces(batch.slot_table[batch.rows[i], seq_len - num_seen : num_read]),
    )


def _plan_masked(batch: ForwardBatch, i: int, window: int | None) -> MaskedPlan:
    start, end, seq_len = batch.cu_seqlens_q[i], batch.cu_seqlens_q[i + 1], batch.seq_lens[i]
    first_query = seq_len - batch.query_lens[i]
    first_key = 0 if window is None else max(0, first_query + 1 - window)
    slots = batch.slot_table[batch.rows[i], first_key:seq_len].astype(np.int64)
    is_run = bool((np.diff(slots) == 1).all())
    distances = np.arange(first_query, seq_len)[:, None] - np.arange(first_key, seq_len)
    is_hidden = (distances < 0) | (distances >= (seq_len if window is None else window))
    return MaskedPlan(
        start=int(start),
        end=int(end),
        keys=Run(int(slots[0]), len(slots)) if is_run else torch.from_numpy(slots),
        bias=torch.from_numpy(np.where(is_hidden, np.float32(-np.inf), np.float32(0))),
    )


def find_pieces(slots: np.ndarray) -> tuple[Run | Tensor, ...]:
    """Split slots into long runs to be read in place, and one piece to be gathered for all short runs.

    Args:
        slots: [n] int32, in the order of positions; may be empty, which gives no piece.
    """
    if not len(slots):
        return ()
    starts = np.flatnonzero(np.diff(slots, prepend=slots[0] - 2) != 1)
    lengths = np.diff(starts, append=len(slots))
    is_short = lengths < MIN_VIEW_LEN
    if is_short.sum() < 2:  # a lone short run is read in place too
        is_short[:] = False
    runs = zip(slots[starts[~is_short]].tolist(), lengths[~is_short].tolist(), strict=True)
    pieces: list[Run | Tensor] = [Run(start, length) for start, length in runs]
    if is_short.any():
        gathered = slots[np.repeat(is_short, lengths)].astype(np.int64)
        pieces.append(torch.from_numpy(gathered))
    return tuple(pieces)


def _read(pool: Tensor, piece: Run | Tensor) -> Tensor:
    """Keys or values of a piece, [length, num_kv_heads, head_dim]: a view, or a copy of a gathered piece."""
    if isinstance(piece, Run):
        return pool[piece.start : piece.start + piece.length]
    # Two dimensions: with three, torch gathers element by element, 30 times slower.
    return pool.flatten(1).index_select(0, piece).view(-1, *pool.shape[1:])


def _attend_group(
    q: Tensor, pool_k: Tensor, pool_v: Tensor, group: GroupPlan, layer: AttentionLayer
) -> Tensor:
    """Decode a group as two batched products, in float32; [b, num_q_heads, head_dim] in the dtype of q."""
    head_dim = q.shape[2]
    num_pairs, _, padded_len = group.bias.shape  # b * num_kv_heads
    queries = q.index_select(0, group.tokens).view(num_pairs, -1, head_dim).float()
    keys = (
        pool_k.view(-1, head_dim).index_select(0, group.kv_rows).view(num_pairs, padded_len, head_dim).float()
    )
    values = (
        pool_v.view(-1, head_dim).index_select(0, group.kv_rows).view(num_pairs, padded_len, head_dim).float()
    )
    scores = _scores(queries, keys, group.bias, layer)
    attended = torch.bmm(scores.softmax(-1), values)  # [b * num_kv_heads, heads per KV head, head_dim]
    return attended.view(-1, q.shape[1], head_dim).to(q.dtype)


def _attend_capped(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, layer: AttentionLayer, out: Tensor
) -> None:
    """Attend with a softcap in float32, some queries at a time so that scores stay in bounds.

    Args:
        q, out: [query_len, num_q_heads, head_dim].
        keys, values: [n, num_kv_heads, head_dim].
        bias: [query_len, n].
    """
    num_keys, num_kv_heads, head_dim = keys.shape
    keys, values = keys.transpose(0, 1).float(), values.transpose(0, 1).float()  # [num_kv_heads, n, head_dim]
    most = max(1, MAX_SCORES // (q.shape[1] * num_keys))
    for some_q, some_bias, some_out in zip(*(torch.split(t, most) for t in (q, bias, out)), strict=True):
        # Query heads of one KV head lie together: [num_kv_heads, heads per KV head * queries, head_dim].
        queries = some_q.transpose(0, 1).reshape(num_kv_heads, -1, head_dim).float()
        scores = _scores(queries, keys, some_bias.repeat(q.shape[1] // num_kv_heads, 1), layer)
        attended = torch.bmm(scores.softmax(-1), values)
        some_out.copy_(attended.view(q.shape[1], -1, head_dim).transpose(0, 1))


def _scores(queries: Tensor, keys: Tensor, bias: Tensor, layer: AttentionLayer) -> Tensor:
    """Scores [n, lq, lk] of [n, lq, head_dim] and [n, lk, head_dim], with the layer's scale and softcap."""
    if layer.softcap is None:
        return torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=layer.scale)
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(layer.scale / layer.softcap)
    return scores.tanh_().mul_(layer.softcap).add_(bias)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, is_causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend [lq, heads, head_dim] to [lk, kv_heads, head_dim].

    Args:
        bias: [lq, lk] float32, added to the scores; no row may be -inf throughout.

    Returns:
        The result [1, heads, lq, head_dim], dtype of q, and the scores' log-sum-exp [1, heads, lq], float32.
    """
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        is_causal=is_causal,
        attn_mask=bias,
        scale=scale,
    )
    return out, logsumexp


def _merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Combine attention over disjoint keys; [1, heads, lq, head_dim].

    With L the log-sum-exp of a part's scores, out = sum(exp(L_i) out_i) / sum(exp(L_i)), two parts at a time.
    https://arxiv.org/abs/2205.14135, section 3.1.
    """
    out, logsumexp = parts[0]
    for other, other_logsumexp in parts[1:]:
        share = torch.sigmoid(other_logsumexp - logsumexp)[..., None]
        out = torch.lerp(out.float(), other.float(), share)
        logsumexp = torch.logaddexp(logsumexp, other_logsumexp)
    return out
