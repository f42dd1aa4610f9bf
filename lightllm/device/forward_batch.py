"""ForwardBatch: what one step computes, as index arrays that model and attention share.

Made by the model runner once a step and read-only from then on. Knows rows and slots, never requests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightllm.device.kv_pool import KVPool


@dataclass(frozen=True, slots=True)
class DeviceIndex:
    """What kernels read of a batch, in the device's memory; there is none on a CPU.

    Attributes:
        slot_table: [max_rows + 1, max_len] int32; its last row is all 0, for padding.
        rows, seq_lens: [n] int32, as in ForwardBatch.
    """

    slot_table: Tensor
    rows: Tensor
    seq_lens: Tensor


@dataclass(slots=True)
class ForwardBatch:
    """n sequences, of each of which the last `query_lens` tokens are computed now; t tokens in all.

    What            | interval of a sequence's positions | where its KV is
    ----------------|------------------------------------|---------------------------------------------
    already computed| [0, seq_len - query_len)           | in the pool, at `slot_table[row, position]`
    computed now    | [seq_len - query_len, seq_len)     | written by the attention backend to `out_slots`

    Attributes:
        num_tokens: t; the tokens of one sequence lie together, in the order of the sequences.
        rows: [n] row of each sequence in `slot_table`.
        seq_lens: [n] tokens of each sequence with KV after this step.
        query_lens: [n] tokens of each sequence computed in this step, at least 1.
        cu_seqlens_q: [n + 1] the tokens of sequence i are [cu_seqlens_q[i], cu_seqlens_q[i + 1]).
        positions: [t] int64, position of each token in its sequence.
        out_slots: [t] int64, pool slot of each token.
        slot_table: [max_rows, max_len] int32, on the CPU; the slots of this step's tokens are already in it.
            Empty where `index` has it.
        kv_pool: read and written by the attention backend.
        index: on a device with kernels, what these read; None on a CPU.
        plan: what `AttentionBackend.plan` made of the above.
        on_kv_written: called by each layer, with its index, when it has called for its keys and values to be
            written.
    """

    num_tokens: int
    rows: np.ndarray
    seq_lens: np.ndarray
    query_lens: np.ndarray
    cu_seqlens_q: np.ndarray
    positions: Tensor
    out_slots: Tensor
    slot_table: np.ndarray
    kv_pool: KVPool
    index: DeviceIndex | None = None
    plan: Any = None
    on_kv_written: Callable[[int], None] | None = None

    @classmethod
    def build(
        cls,
        *,
        rows: np.ndarray,
        seq_lens: np.ndarray,
        query_lens: np.ndarray,
        positions: Tensor,
        out_slots: Tensor,
        slot_table: np.ndarray,
        kv_pool: KVPool,
        index: DeviceIndex | None = None,
    ) -> "ForwardBatch":
        """Derive the rest; the caller sets `plan` afterwards, and `on_kv_written` if it wants."""
        cu_seqlens_q = np.zeros(len(query_lens) + 1, dtype=np.int64)
        np.cumsum(query_lens, out=cu_seqlens_q[1:])
        return cls(
            num_tokens=int(cu_seqlens_q[-1]),
            rows=rows,
            seq_lens=seq_lens,
            query_lens=query_lens,
            cu_seqlens_q=cu_seqlens_q,
            positions=positions,
            out_slots=out_slots,
            slot_table=slot_table,
            kv_pool=kv_pool,
            index=index,
        )
