"""DeviceTables: the tables of rows in a device's memory, kept up to date by small uploads.

What RowTables is on a CPU. Token ids and slots of all rows lie on the device, so that a step finds the tokens
that the step before it sampled without the host ever seeing them. The host keeps what sampling needs, as
columns by row. Runs in the worker; every call only queues work.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lightllm.device.base import Device
from lightllm.device.forward_batch import DeviceIndex
from lightllm.kernels.row_tables import append_tokens, gather_inputs, scatter_table
from lightllm.messages import NewRequest, ScheduledBatch
from lightllm.worker.inputs import StepInputs, ranges, row_state
from lightllm.worker.sampler import RowState

ALIGNMENT = 4  # int32 elements: Triton compiles a kernel anew for pointers that are not at 16 bytes


class SamplingColumns:
    """What each row's request asks of the sampler, [max_rows] each; valid while the request holds its row.

    Attributes:
        is_plain: greedy, nothing changes its logits, and no probabilities are reported.
        has_processors: something changes its logits.
        temperature, top_k, top_p, min_p: 0, 0, 1 and 0 are off.
        seed, sample_index, num_prompt_tokens: the keys of its noise, with the length.
    """

    def __init__(self, max_rows: int) -> None:
        self.is_plain = np.zeros(max_rows, dtype=bool)
        self.has_processors = np.zeros(max_rows, dtype=bool)
        self.has_logprobs = np.zeros(max_rows, dtype=bool)
        self.has_prompt_logprobs = np.zeros(max_rows, dtype=bool)
        self.filters = np.zeros((4, max_rows), dtype=np.float32)
        self.seed = np.zeros(max_rows, dtype=np.int64)
        self.sample_index = np.zeros(max_rows, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(max_rows, dtype=np.int64)

    def set(self, new: NewRequest, state: RowState) -> None:
        """Fill in the row of a request that enters it."""
        row, params = new.row, new.sampling_params
        self.has_processors[row] = bool(state.processors)
        self.has_logprobs[row] = params.logprobs is not None
        self.has_prompt_logprobs[row] = params.prompt_logprobs is not None
        self.is_plain[row] = params.is_greedy and not state.processors and params.logprobs is None
        temperature = 0.0 if params.is_greedy else params.temperature
        self.filters[:, row] = (temperature, max(params.top_k, 0), params.top_p, params.min_p)
        self.seed[row] = new.seed
        self.sample_index[row] = new.sample_index
        self.num_prompt_tokens[row] = new.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Where the inputs of a decode batch of fixed size lie, for a graph.

    Attributes:
        packed: [3 * width] int32: rows, seq_lens, positions, each from a multiple of `width` on.
        index, packed_positions: views of `packed` as kernels want them.
        token_ids, out_slots, positions: [size] int64.
    """

    size: int
    packed: Tensor
    index: DeviceIndex
    packed_positions: Tensor
    token_ids: Tensor
    out_slots: Tensor
    positions: Tensor

    @classmethod
    def inside(cls, size: int, packed: Tensor, columns: Tensor, slot_table: Tensor) -> Self:
        """For `size` sequences, in memory made for more: packed [>= 3 * width], columns [3, >= size]."""
        width = aligned(size)
        rows, seq_lens, positions = (packed[i * width : i * width + size] for i in range(3))
        return cls(
            size,
            packed[: 3 * width],
            DeviceIndex(slot_table, rows, seq_lens),
            positions,
            *columns[:, :size].unbind(),
        )


class DeviceTables:
    """Tables of all rows; `token_ids` and `slots` are [max_rows + 1, max_len + 1] int32.

    The last row is that of padding: its slots are all 0, the dummy's.
    """

    def __init__(self, max_rows: int, max_len: int, device: Device) -> None:
        self.device = device
        self.padding_row = max_rows
        shape = (max_rows + 1, max_len + 1)
        self.token_ids = torch.zeros(shape, dtype=torch.int32, device=device.torch_device)
        self.slots = torch.zeros(shape, dtype=torch.int32, device=device.torch_device)
        self.states: list[RowState | None] = [None] * max_rows
        self.columns = SamplingColumns(max_rows)

    def apply(self, batch: ScheduledBatch) -> None:
        """Take over the batch's diffs; must be called once per batch, in order."""
        for row in batch.freed_rows:
            self.states[row] = None
        parts: list[np.ndarray] = []
        for new in batch.new_requests:
            state = row_state(new)
            self.states[new.row] = state
            self.columns.set(new, state)
        num_slots, num_ids = len(batch.slots), sum(len(new.token_ids) for new in batch.new_requests)
        if num_slots:
            parts += [*ranges(batch.rows, batch.slot_starts, batch.slot_counts), np.array(batch.slots)]
        if num_ids:
            rows = [new.row for new in batch.new_requests]
            counts = [len(new.token_ids) for new in batch.new_requests]
            parts += ranges(rows, [0] * len(rows), counts)
            parts.append(np.concatenate([np.array(new.token_ids) for new in batch.new_requests]))
        if parts:
            packed = self.device.upload(np.concatenate(parts).astype(np.int32))
            scatter_table(self.slots, packed, 0, num_slots)
            scatter_table(self.token_ids, packed, 3 * num_slots, num_ids)

    def inputs(self, batch: ScheduledBatch, into: StepTensors | None = None) -> StepInputs:
        """Gather the inputs of a batch that has been applied.

        Args:
            into: for a batch of decodes only: where to write, padded to its size.
        """
        rows = np.array(batch.rows)
        query_lens = np.array(batch.num_new_tokens) if into is None else np.ones(len(rows), dtype=np.int64)
        seq_lens = np.array(batch.starts) + query_lens
        if into is None:
            token_rows, positions = ranges(batch.rows, batch.starts, batch.num_new_tokens)
            uploaded = self._upload_columns(rows, seq_lens, token_rows, positions)
            num_tokens = len(positions)
            ids = torch.empty(3, aligned(num_tokens), dtype=torch.int64, device=self.slots.device)
            target = [column[:num_tokens] for column in ids]
            index = DeviceIndex(self.slots, uploaded[0], uploaded[1])
            places = (uploaded[2], uploaded[3])
        else:
            index = into.index
            packed = np.zeros((3, aligned(into.size)), dtype=np.int32)
            packed[0] = self.padding_row
            packed[1] = 1
            for line, column in zip(packed, (rows, seq_lens, seq_lens - 1), strict=True):
                line[: len(rows)] = column
            self.device.upload(packed.reshape(-1), into.packed)
            places = (index.rows, into.packed_positions)
            target = [into.token_ids, into.out_slots, into.positions]
        gather_inputs(self.token_ids, self.slots, *places, *target)
        return StepInputs(
            rows=rows,
            token_ids=target[0],
            out_slots=target[1],
            positions=target[2],
            seq_lens=seq_lens,
            query_lens=query_lens,
            index=index,
        )

    def known_tokens(self, row: int, length: int) -> Tensor:
        """The first `length` token ids of a row, [length] int64, on the device."""
        return self.token_ids[row, :length].long()

    def append(self, rows: Tensor, lengths: Tensor, token_ids: Tensor) -> None:
        """Write sampled tokens [n] int64 behind the known ones; rows, lengths: [n] int32."""
        append_tokens(self.token_ids, rows, lengths, token_ids)

    def _upload_columns(self, *columns: np.ndarray) -> list[Tensor]:
        """Upload int columns in one piece; each starts aligned."""
        starts = np.cumsum([0, *(aligned(len(column)) for column in columns)])
        packed = np.zeros(starts[-1], dtype=np.int32)
        for start, column in zip(starts, columns, strict=False):
            packed[start : start + len(column)] = column
        uploaded = self.device.upload(packed)
        return [uploaded[s : s + len(c)] for s, c in zip(starts.tolist(), columns, strict=False)]


def aligned(count: int) -> int:
    """`count`, rounded up to what keeps the next part at 16 bytes."""
    return -(-count // ALIGNMENT) * ALIGNMENT
