"""RowTables: what the worker remembers of each row between steps, and how a batch becomes model inputs.

A row is one running request. Its token ids and slots live in two tables, kept up to date by the diffs that
ScheduledBatch carries; sampled tokens are written where the next step will read them, so that the engine may
schedule that step before it knows them. Runs in the worker, on the device.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightllm.device.forward_batch import DeviceIndex
from lightllm.messages import NewRequest, ScheduledBatch
from lightllm.worker.sampler import RowState


@dataclass(slots=True)
class StepInputs:
    """Index arrays of one step; n rows, t tokens in all.

    Attributes:
        rows: [n] row of each request.
        positions: [t] int64, position of each token in its request.
        token_ids: [t] int64.
        out_slots: [t] int64, the pool slot of each token.
        seq_lens, query_lens: [n], tokens with KV after this step, and tokens computed in it.
        index: what kernels read; None on a CPU.
    """

    rows: np.ndarray
    positions: Tensor
    token_ids: Tensor
    out_slots: Tensor
    seq_lens: np.ndarray
    query_lens: np.ndarray
    index: DeviceIndex | None = None


class RowTables:
    """Tables of all rows: `token_ids` and `slots`, [max_rows, max_len] int32, and the rows' sampling states.

    Allocated whole but touched only where rows are used.
    """

    def __init__(self, max_rows: int, max_len: int) -> None:
        # One column more than a request can have tokens: the one sampled beside an overlapped stop.
        self.token_ids = np.empty((max_rows, max_len + 1), dtype=np.int32)
        self.slots = np.empty((max_rows, max_len + 1), dtype=np.int32)
        self.states: list[RowState | None] = [None] * max_rows

    def apply(self, batch: ScheduledBatch) -> None:
        """Take over the batch's diffs; must be called once per batch, in order."""
        for row in batch.freed_rows:
            self.states[row] = None
        for new in batch.new_requests:
            self.token_ids[new.row, : len(new.token_ids)] = new.token_ids
            self.states[new.row] = row_state(new)
        if batch.slots:
            rows, positions = ranges(batch.rows, batch.slot_starts, batch.slot_counts)
            self.slots[rows, positions] = batch.slots
        for i, drafts in batch.drafts.items():
            start = batch.starts[i] + 1
            self.token_ids[batch.rows[i], start : start + len(drafts)] = drafts

    def inputs(self, batch: ScheduledBatch) -> StepInputs:
        """Gather the inputs of a batch that has been applied."""
        rows, positions = ranges(batch.rows, batch.starts, batch.num_new_tokens)
        query_lens = np.array(batch.num_new_tokens)
        return StepInputs(
            rows=np.array(batch.rows),
            positions=torch.from_numpy(positions),
            token_ids=torch.from_numpy(self.token_ids[rows, positions].astype(np.int64)),
            out_slots=torch.from_numpy(self.slots[rows, positions].astype(np.int64)),
            seq_lens=np.array(batch.starts) + query_lens,
            query_lens=query_lens,
        )

    def known_tokens(self, row: int, length: int) -> Tensor:
        """The first `length` token ids of a row, [length] int64."""
        return torch.from_numpy(self.token_ids[row, :length].astype(np.int64))

    def append(self, rows: np.ndarray, positions: np.ndarray, token_ids: Tensor) -> None:
        """Write sampled tokens [n] to the given places."""
        self.token_ids[rows, positions] = token_ids.numpy()


def row_state(new: NewRequest) -> RowState:
    """What the sampler keeps of a request that enters a row."""
    return RowState(
        params=new.sampling_params,
        num_prompt_tokens=new.num_prompt_tokens,
        eos_token_ids=new.eos_token_ids,
        seed=new.seed,
        sample_index=new.sample_index,
    )


def split_drafts(batch: ScheduledBatch, inputs: StepInputs) -> tuple[StepInputs, np.ndarray]:
    """Make a sequence of its own of every position of a request with drafts.

    Each then attends as a decode of its length does, to the keys that the step writes before it too: sums are
    in the same order with drafts and without, so that tokens are the same as well.

    Returns:
        The inputs, and for each of their sequences the index of its request in the batch.
    """
    owners = np.arange(len(batch.rows))
    if not batch.drafts:
        return inputs, owners
    counts = np.array([len(batch.drafts.get(i, ())) + 1 for i in range(len(batch.rows))])
    owners = owners.repeat(counts)
    # Of n sequences of a request the first ends n - 1 tokens before the last.
    before_last = counts.cumsum()[owners] - 1 - np.arange(len(owners))
    split = replace(
        inputs,
        rows=inputs.rows[owners],
        seq_lens=inputs.seq_lens[owners] - before_last,
        query_lens=np.where(counts > 1, 1, inputs.query_lens)[owners],
    )
    return split, owners


def ranges(rows: list[int], starts: list[int], counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Flatten ranges [start, start + count) of rows into (row, position) per element."""
    if counts.count(1) == len(counts):  # a step of decodes
        return np.array(rows, dtype=np.int64), np.array(starts, dtype=np.int64)
    sizes = np.array(counts)
    ends = sizes.cumsum()
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)
    return np.repeat(np.array(rows), sizes), np.repeat(np.array(starts), sizes) + within
