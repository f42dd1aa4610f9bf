"""ModelRunner: one scheduled batch through the model and the sampler.

Runs in the worker. Owns the row tables and the KV pool's use; knows nothing of requests beyond their rows,
and nothing
of scheduling: it computes exactly what the batch says, in the order of batches.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightllm.attention.base import AttentionBackend
from lightllm.device.base import ApproachedMoment, Device, Moment, PastMoment
from lightllm.device.forward_batch import ForwardBatch
from lightllm.device.kv_pool import KVPool
from lightllm.messages import ScheduledBatch, StepOutput, TokenLogprobs
from lightllm.models.base import Model
from lightllm.worker.inputs import RowTables, StepInputs, split_drafts
from lightllm.worker.sampler import RowState, SamplingRow
from lightllm.worker.token_choice import OwnChoice, TokenChoice

PROMPT_LOGITS_ROWS = 64


class LaunchedStep:
    """A step whose work has been done, or queued on a device.

    Args:
        collect: makes the result; waits for the device.

    Attributes:
        kv_written: the moment behind which all its KV is in the pool, if that comes before its end.
    """

    def __init__(self, collect: Callable[[], StepOutput], kv_written: Moment | None = None) -> None:
        self._collect = collect
        self.kv_written = kv_written

    def result(self) -> StepOutput:
        """Wait for the step's tokens. Call it once, from any thread."""
        return self._collect()


class KVWritten:
    """When all KV of a step is in the pool: behind the last layer's attention, before the step's end.

    Attributes:
        moment: for `LaunchedStep.kv_written`, to be waited for asleep while earlier layers are computed; None
            until the last layer has called for its KV to be written.
    """

    def __init__(self, device: Device, num_layers: int) -> None:
        self.moment: Moment | None = None
        self._near: Moment = PastMoment()
        self._device, self._num_layers = device, num_layers

    def note(self, layer: int) -> None:
        """This layer has called for its KV to be written; see ForwardBatch.on_kv_written."""
        if layer == self._num_layers - 2:
            self._near = self._device.mark()
        elif layer == self._num_layers - 1:
            self.moment = ApproachedMoment(self._near, self._device.mark(is_urgent=True))


class Runner(ABC):
    """Launches batches in order; their KV is in `kv_pool`."""

    kv_pool: KVPool

    @abstractmethod
    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Compute one step, or queue it where the device runs by itself."""


class ModelRunner(Runner):
    """Runs batches on a CPU: a step is computed when `launch` returns.

    Args:
        model: the loaded model.
        backend: computes attention over `kv_pool`.
        kv_pool: KV of all tokens, by slot.
        tables: the rows.
        choice: chooses tokens; None: this rank is the only one.
    """

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        kv_pool: KVPool,
        tables: RowTables,
        choice: TokenChoice | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        self.kv_pool = kv_pool
        self.tables = tables
        self.choice = choice or OwnChoice()

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Compute one step; returns when its tokens are known."""
        output = self._run(batch)
        return LaunchedStep(lambda: output)

    @torch.inference_mode()
    def _run(self, batch: ScheduledBatch) -> StepOutput:
        started = time.perf_counter()
        self.tables.apply(batch)
        if not batch.rows:
            return StepOutput(step_id=batch.step_id, token_ids=[])
        inputs = self.tables.inputs(batch)
        sequences, owners = split_drafts(batch, inputs)
        hidden = forward(self.model, self.backend, self.kv_pool, sequences, self.tables.slots)
        token_ids, logprobs = self._sample(batch, sequences, owners, hidden)
        prompt_logprobs = prompt_logprobs_of(batch, inputs, hidden, self.model, self.tables, self.choice)
        return StepOutput(
            step_id=batch.step_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            duration_s=time.perf_counter() - started,
        )

    def _sample(
        self, batch: ScheduledBatch, sequences: StepInputs, owners: np.ndarray, hidden: Tensor
    ) -> tuple[list[list[int]], dict[int, list[TokenLogprobs]]]:
        token_ids: list[list[int]] = [[] for _ in batch.rows]
        logprobs: dict[int, list[TokenLogprobs]] = {}
        if not any(batch.is_sampling):
            return token_ids, logprobs
        sampling = np.flatnonzero(np.array(batch.is_sampling)[owners])
        last = sequences.query_lens.cumsum()[sampling] - 1
        logits = self.model.logits(hidden[torch.from_numpy(last)])  # [n, vocab]
        rows, lengths = sequences.rows[sampling], sequences.seq_lens[sampling]
        sampled = self.choice.choose(
            logits, [self._sampling_row(row, n) for row, n in zip(rows, lengths, strict=True)]
        )
        # Behind a refuted draft this writes nonsense, which a later step writes over before it reads there.
        self.tables.append(rows, lengths, sampled.token_ids)
        for j, token_id in enumerate(sampled.token_ids.tolist()):
            i = int(owners[sampling[j]])
            taken = token_ids[i]
            if taken and taken[-1] != batch.drafts[i][len(taken) - 1]:
                continue  # what was computed here follows a token that is not there
            taken.append(token_id)
            if j in sampled.logprobs:
                logprobs.setdefault(i, []).append(sampled.logprobs[j])
        return token_ids, logprobs

    def _sampling_row(self, row: int, num_tokens: int) -> SamplingRow:
        return SamplingRow(self._state(row), num_tokens, partial(self.tables.known_tokens, row, num_tokens))

    def _state(self, row: int) -> RowState:
        state = self.tables.states[row]
        assert state is not None, f"row {row} was scheduled without a request"
        return state


class Tables(Protocol):
    """The tables of rows, as far as functions for all devices need them."""

    states: list[RowState | None]

    def known_tokens(self, row: int, length: int) -> Tensor:
        """The first `length` token ids of a row, [length] int64."""
        ...


def forward(
    model: Model,
    backend: AttentionBackend,
    kv_pool: KVPool,
    inputs: StepInputs,
    slot_table: np.ndarray,
    on_kv_written: Callable[[int], None] | None = None,
) -> Tensor:
    """Plan and compute a step's hidden states: [num_tokens, hidden].

    Args:
        slot_table: on the CPU; empty where the inputs have an index.
        on_kv_written: see ForwardBatch.
    """
    batch = ForwardBatch.build(
        rows=inputs.rows,
        seq_lens=inputs.seq_lens,
        query_lens=inputs.query_lens,
        positions=inputs.positions,
        out_slots=inputs.out_slots,
        slot_table=slot_table,
        kv_pool=kv_pool,
        index=inputs.index,
    )
    batch.plan = backend.plan(batch)
    batch.on_kv_written = on_kv_written
    return model(inputs.token_ids, inputs.positions, batch)


def prompt_logprobs_of(
    batch: ScheduledBatch,
    inputs: StepInputs,
    hidden: Tensor,
    model: Model,
    tables: Tables,
    choice: TokenChoice,
) -> dict[int, list[TokenLogprobs]]:
    """What StepOutput.prompt_logprobs holds; waits for the device if a request asked for them."""
    found: dict[int, list[TokenLogprobs]] = {}
    ends = inputs.query_lens.cumsum()
    for i, row in enumerate(batch.rows):
        state = tables.states[row]
        assert state is not None, f"row {row} was scheduled without a request"
        count = state.params.prompt_logprobs
        start = batch.starts[i]
        # Position p predicts the token at p + 1, which must still be part of the prompt.
        num_predicted = min(batch.num_new_tokens[i], state.num_prompt_tokens - 1 - start)
        if count is None or num_predicted <= 0:
            continue
        first = int(ends[i]) - batch.num_new_tokens[i]
        targets = tables.known_tokens(row, start + 1 + num_predicted)[start + 1 :]
        entries: list[TokenLogprobs] = []
        for a in range(0, num_predicted, PROMPT_LOGITS_ROWS):  # bounds the memory of the logits
            b = min(a + PROMPT_LOGITS_ROWS, num_predicted)
            logits = model.logits(hidden[first + a : first + b])
            entries += choice.score(logits, targets[a:b], [count] * (b - a))
        found[i] = entries
    return found
