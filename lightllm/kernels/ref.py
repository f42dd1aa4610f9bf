"""The plain version of every fused operation: torch only, right on every device, the oracle of the fast ones.

Statistics and angles are float32 whatever the dtype of the data; results have the dtype of the data.
"""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. https://arxiv.org/abs/1910.07467

    Args:
        x: [..., size], any strides.
        weight: [size].
        eps: added to the mean square.

    Returns:
        A new tensor of the shape and dtype of x.
    """
    # Measured on a CPU, 16 rows of 576: 15 us, functional.rms_norm 31 us.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # [..., 1]
    scale = torch.rsqrt(norm * norm * (1.0 / weight.shape[0]) + eps)
    return (x * scale).to(x.dtype).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place, then the norm of the residual as a new tensor; both [n, size]."""
    return rms_norm(residual.add_(x), weight, eps)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate heads in place: (a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of what is rotated.

    https://arxiv.org/abs/2104.09864, in the layout of HF models: i is paired with i + rotary_dim / 2.

    Args:
        x: [n, num_heads, head_dim], last dimension contiguous; only the first rotary_dim dimensions change.
        cos, sin: [n, rotary_dim / 2] float32.
    """
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    rotated = torch.addcmul(a * cos, b, sin, value=-1)
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(rotated)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, for [n, 2 * size] with the gate in the first half; a new tensor [n, size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up with the tanh approximation, in the layout of `silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh").mul_(up)


def kv_write(k: Tensor, v: Tensor, pool_k: Tensor, pool_v: Tensor, slots: Tensor) -> None:
    """pool[slots[i]] = x[i] for keys and values [n, num_kv_heads, head_dim]; slots: [n] int64."""
    pool_k[slots] = k
    pool_v[slots] = v


def copy_rows(
    source: Tensor, source_slots: Tensor | None, target: Tensor, target_slots: Tensor | None
) -> None:
    """target[:, target_slots] = source[:, source_slots], as in kernels/kv_rows.py."""
    rows = source if source_slots is None else source[:, source_slots]
    if target_slots is None:
        target[:, : rows.shape[1]] = rows
    else:
        target[:, target_slots] = rows


def scatter_table(table: Tensor, packed: Tensor, offset: int, count: int) -> None:
    """table[row, position] = value for `count` triples: in `packed` from `offset` rows, positions, values."""
    rows, positions, values = packed[offset : offset + 3 * count].view(3, count)
    table[rows.long(), positions.long()] = values


def gather_inputs(
    token_table: Tensor,
    slot_table: Tensor,
    rows: Tensor,
    positions: Tensor,
    ids: Tensor,
    out_slots: Tensor,
    out_positions: Tensor,
) -> None:
    """Token ids and slots of n places of the tables, and the positions, into int64 tensors [n]."""
    places = (rows.long(), positions.long())
    ids.copy_(token_table[places])
    out_slots.copy_(slot_table[places])
    out_positions.copy_(positions)


def append_tokens(token_table: Tensor, rows: Tensor, lengths: Tensor, token_ids: Tensor) -> None:
    """token_table[rows[i], lengths[i]] = token_ids[i], for [n] each."""
    token_table[rows.long(), lengths.long()] = token_ids.int()


def paged_attention(
    q: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    slots: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of the last tokens of one sequence over its KV in the pool, in float32.

    Args:
        q: [query_len, num_q_heads, head_dim].
        pool_k, pool_v: [num_slots, num_kv_heads, head_dim].
        slots: [seq_len] int, the slots of all its tokens in order.
        scale, window, softcap: see AttentionLayer.

    Returns:
        [query_len, num_q_heads * head_dim], the dtype of q.
    """
    group = q.shape[1] // pool_k.shape[1]
    keys = pool_k[slots.long()].float().repeat_interleave(group, 1).permute(1, 2, 0)
    values = pool_v[slots.long()].float().repeat_interleave(group, 1).transpose(0, 1)
    scores = q.transpose(0, 1).float() @ keys * scale  # [num_q_heads, query_len, seq_len]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    key = torch.arange(len(slots), device=q.device)
    position = key[len(slots) - q.shape[0] :, None]
    is_hidden = key > position
    if window is not None:
        is_hidden |= key <= position - window
    weights = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
    return (weights @ values).transpose(0, 1).flatten(1).to(q.dtype)


def sample_tokens(logits: Tensor, params: Tensor, noise: Tensor) -> Tensor:
    """Draw one token per row by sorting; see kernels/sample.py for arguments and meaning.

    The place in the order of falling probability (ids break ties) where the cumulative weight passes
    noise * (weight kept by the filters); without any filter, in the order of ids.
    """
    temperature, top_k, top_p, min_p = params.double()[:, :, None]
    scaled = torch.where(temperature > 0, logits.double() / temperature.clamp(min=1e-30), logits.double())
    weights = (scaled - scaled.max(-1, keepdim=True).values).exp()
    is_filtered = (top_k > 0) | (top_p < 1) | (min_p > 0)
    ids = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    rank, before = ids, ordered.cumsum(-1) - ordered
    keep = (rank < top_k) | (top_k <= 0)
    keep &= (before < top_p * weights.sum(-1, keepdim=True)) & (ordered >= min_p)
    keep[:, 0] = True
    ordered = torch.where(is_filtered, ordered * keep, weights)
    order = torch.where(is_filtered, order, ids)
    cumulative = ordered.cumsum(-1)
    target = noise.double()[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    place = torch.minimum(place, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
    drawn = order.gather(1, place)[:, 0]
    return torch.where(temperature[:, 0] > 0, drawn, logits.argmax(-1))


def penalise_(
    logits: Tensor, lines: Tensor, token_table: Tensor, spans: Tensor, params: Tensor, longest: int
) -> None:
    """Repetition, presence and frequency penalties in place; see kernels/penalties.py for the arguments."""
    for line, span, (repetition, presence, frequency) in zip(
        lines.tolist(), spans.tolist(), params.tolist(), strict=True
    ):
        row, counted_from, length = span
        token_ids = token_table[row, :length].long()
        seen = torch.unique(token_ids)
        values = logits[line, seen]
        logits[line, seen] = torch.where(values > 0, values / repetition, values * repetition).clamp_(
            max=1e30
        )
        ids, counts = torch.unique(token_ids[counted_from:], return_counts=True)
        logits[line, ids] -= frequency * counts + presence


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for x [n, in_features]."""
    return functional.linear(x, weight, bias)
