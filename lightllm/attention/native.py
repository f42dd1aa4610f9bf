"""Attention by the C kernels: float32, straight from the pool by slot, whatever lies where.

A decoding sequence is cut into chunks of keys that all threads share, a prompt into runs of queries; results
are summed in an order that depends on the sequence only, never on the batch.
"""

import ctypes
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightllm.attention.base import AttentionBackend, AttentionLayer
from lightllm.device.forward_batch import ForwardBatch
from lightllm.native.library import (
    MAX_GROUP,
    MAX_HEAD_DIM,
    PANEL,
    QUERY_ROWS,
    SPLIT,
    Attention,
    NativeLibrary,
)


@dataclass(slots=True)
class Parts:
    """What is computed at once, for one size of the window; see `struct attention` for the columns."""

    decodes: np.ndarray
    merges: np.ndarray
    prefills: np.ndarray
    partial: Tensor

    @property
    def arguments(self) -> tuple[int, int, int, int, int, int]:
        """Addresses and lengths for `ll_attend`."""
        return (
            *(self.decodes.ctypes.data, len(self.decodes), self.merges.ctypes.data, len(self.merges)),
            *(self.prefills.ctypes.data, len(self.prefills)),
        )


@dataclass(slots=True)
class Plan:
    """The structure that the kernels read, the arrays whose addresses are in it, and parts by window."""

    attention: Attention
    arrays: tuple[np.ndarray, ...]
    parts: dict[int | None, tuple[Parts, tuple[int, ...]]] = field(default_factory=dict)


class NativeAttention(AttentionBackend):
    """See the module.

    Args:
        library: the kernels.
    """

    name: ClassVar[str] = "native"

    def __init__(self, library: NativeLibrary) -> None:
        self.library = library

    @staticmethod
    def supports(dtype: torch.dtype, head_dim: int, group: int) -> bool:
        """Whether the kernels have been written for these sizes."""
        return (
            dtype == torch.float32
            and head_dim % PANEL == 0
            and head_dim <= MAX_HEAD_DIM
            and group <= MAX_GROUP
        )

    def plan(self, batch: ForwardBatch) -> Plan:
        """Collect what is the same for all layers."""
        arrays = tuple(
            np.ascontiguousarray(a, dtype=np.int64)
            for a in (batch.rows, batch.seq_lens, batch.query_lens, batch.cu_seqlens_q)
        )
        rows, seq_lens, query_lens, starts = (a.ctypes.data for a in arrays)
        attention = Attention(
            rows=rows,
            seq_lens=seq_lens,
            query_lens=query_lens,
            starts=starts,
            out_slots=batch.out_slots.data_ptr(),
            slots=batch.slot_table.ctypes.data,
            slots_stride=batch.slot_table.shape[1],
            num_tokens=batch.num_tokens,
            num_kv_heads=batch.kv_pool.num_kv_heads,
            head_dim=batch.kv_pool.head_dim,
        )
        return Plan(attention, arrays)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        """See the base class."""
        plan: Plan = batch.plan
        a = plan.attention
        num_q_heads = q.shape[1]
        if layer.window not in plan.parts:
            parts = _parts(batch, num_q_heads // a.num_kv_heads, layer.window)
            plan.parts[layer.window] = (parts, parts.arguments)
        parts, arguments = plan.parts[layer.window]
        out = torch.empty(q.shape[0], num_q_heads * a.head_dim)
        a.q, a.k, a.v, a.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        a.q_stride, a.k_stride, a.v_stride, a.num_q_heads = q.stride(0), k.stride(0), v.stride(0), num_q_heads
        a.pool_k, a.pool_v = batch.kv_pool.k[layer.index].data_ptr(), batch.kv_pool.v[layer.index].data_ptr()
        a.partial, a.window = parts.partial.data_ptr(), layer.window or 0
        a.scale, a.softcap = layer.scale, layer.softcap or 0.0
        self.library.ll_attend(ctypes.addressof(a), *arguments)
        return out


def _parts(batch: ForwardBatch, group: int, window: int | None) -> Parts:
    num_kv_heads, head_dim = batch.kv_pool.num_kv_heads, batch.kv_pool.head_dim
    is_decode = batch.query_lens == 1
    decodes, merges, num_records = _decodes(np.flatnonzero(is_decode), batch.seq_lens, num_kv_heads, window)
    return Parts(
        decodes=decodes,
        merges=merges,
        prefills=_prefills(np.flatnonzero(~is_decode), batch.query_lens, num_kv_heads, QUERY_ROWS // group),
        partial=torch.empty(num_records * group * (head_dim + 2)),
    )


def _decodes(
    sequences: np.ndarray, seq_lens: np.ndarray, num_kv_heads: int, window: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Parts [p, 4] of decoding sequences, the merges of those that have several, and how many records."""
    lengths = seq_lens[sequences]
    first = np.maximum(lengths - window, 0) // SPLIT if window else np.zeros_like(lengths)
    counts = (-(-lengths // SPLIT) - first).repeat(num_kv_heads)  # chunks of each (sequence, head)
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    owner = np.repeat(np.arange(len(counts)), counts)
    chunk = np.arange(total) - (ends - counts)[owner] + first.repeat(num_kv_heads)[owner]
    is_split = counts > 1
    record = np.where(is_split[owner], np.cumsum(is_split[owner]) - 1, -1)
    names = np.column_stack(
        (sequences.repeat(num_kv_heads), np.tile(np.arange(num_kv_heads), len(sequences)))
    )
    split_counts = counts[is_split]
    merges = np.column_stack((names[is_split], split_counts.cumsum() - split_counts, split_counts))
    decodes = np.column_stack((names[owner], chunk, record))
    return _int32(decodes), _int32(merges), int(split_counts.sum())


def _prefills(
    sequences: np.ndarray, query_lens: np.ndarray, num_kv_heads: int, num_queries: int
) -> np.ndarray:
    """Parts [p, 4] of prompts: runs of queries of each head, the later and longer ones first."""
    parts = [
        (sequence, head, start, min(num_queries, int(query_lens[sequence]) - start))
        for sequence in sequences.tolist()
        for start in reversed(range(0, int(query_lens[sequence]), num_queries))
        for head in range(num_kv_heads)
    ]
    return _int32(np.array(parts, dtype=np.int32).reshape(-1, 4))


def _int32(table: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(table, dtype=np.int32)
