"""Attention spelled out: the oracle of every other backend, and what `auto` falls back to.

Gathers each sequence's keys and values by slot, and takes scores and softmax in float32.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightllm.attention.base import AttentionBackend, AttentionLayer
from lightllm.device.forward_batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """One sequence.

    Attributes:
        start, end: its tokens in the batch.
        slots: [seq_len] int64, its slots in the order of positions.
        distances: [query_len, seq_len] int64, how far each key lies behind each query; below 0: ahead of it.
    """

    start: int
    end: int
    slots: Tensor
    distances: Tensor


class TorchRefAttention(AttentionBackend):
    """The plain formula, per sequence: softmax(cap(scale q k^T) + bias) v, the bias -inf on unseen keys."""

    name: ClassVar[str] = "torch_ref"

    def plan(self, batch: ForwardBatch) -> list[SequencePlan]:
        """Collect slots and distances of each sequence."""
        sequences = []
        for i, row in enumerate(batch.rows):
            start, end, seq_len = (
                int(batch.cu_seqlens_q[i]),
                int(batch.cu_seqlens_q[i + 1]),
                int(batch.seq_lens[i]),
            )
            slots = torch.from_numpy(batch.slot_table[row, :seq_len]).long()
            distances = batch.positions[start:end, None] - torch.arange(seq_len)
            sequences.append(SequencePlan(start, end, slots, distances))
        return sequences

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        """See the base class."""
        pool_k, pool_v = batch.kv_pool.k[layer.index], batch.kv_pool.v[layer.index]
        pool_k[batch.out_slots] = k
        pool_v[batch.out_slots] = v
        group = q.shape[1] // k.shape[1]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for s in batch.plan:
            queries = q[s.start : s.end].transpose(0, 1).float()  # [num_q_heads, query_len, head_dim]
            keys = pool_k[s.slots].float().repeat_interleave(group, 1).permute(1, 2, 0)
            values = pool_v[s.slots].float().repeat_interleave(group, 1).transpose(0, 1)
            scores = queries @ keys * layer.scale  # [num_q_heads, query_len, seq_len]
            if layer.softcap is not None:
                scores = layer.softcap * torch.tanh(scores / layer.softcap)
            is_hidden = s.distances < 0
            if layer.window is not None:
                is_hidden |= s.distances >= layer.window
            scores.masked_fill_(is_hidden, -torch.inf)
            out[s.start : s.end] = (scores.softmax(-1) @ values).transpose(0, 1)
        return out.flatten(1)
