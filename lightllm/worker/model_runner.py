"""ModelRunner: one scheduled batch through the model and the sampler.

Runs in the worker. Owns the row tables and the KV pool's use; knows nothing of requests beyond their rows,
and nothing
of scheduling: it computes exactly what the batch says, in the order of batches.
"""

import time
from functools import partial

import torch
from torch import Tensor

from lightllm.attention.base import AttentionBackend
from lightllm.device.forward_batch import ForwardBatch
from lightllm.device.kv_pool import KVPool
from lightllm.messages import ScheduledBatch, StepOutput, TokenLogprobs
from lightllm.models.base import Model
from lightllm.worker.inputs import RowTables, StepInputs
from lightllm.worker.sampler import RowState, SamplingRow, sample, token_logprobs

PROMPT_LOGITS_ROWS = 64


class ModelRunner:
    """Runs batches on one device.

    Args:
        model: the loaded model.
        backend: computes attention over `kv_pool`.
        kv_pool: KV of all tokens, by slot.
        tables: the rows.
    """

    def __init__(self, model: Model, backend: AttentionBackend, kv_pool: KVPool, tables: RowTables) -> None:
        self.model = model
        self.backend = backend
        self.kv_pool = kv_pool
        self.tables = tables

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Compute one step; returns when its tokens are known."""
        started = time.perf_counter()
        self.tables.apply(batch)
        if not batch.rows:
            return StepOutput(step_id=batch.step_id, token_ids=[])
        inputs = self.tables.inputs(batch)
        hidden = self._forward(inputs)
        token_ids, logprobs = self._sample(batch, inputs, hidden)
        prompt_logprobs = self._prompt_logprobs(batch, inputs, hidden)
        return StepOutput(
            step_id=batch.step_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            duration_s=time.perf_counter() - started,
        )

    def _forward(self, inputs: StepInputs) -> Tensor:
        positions = torch.from_numpy(inputs.positions)
        batch = ForwardBatch.build(
            rows=inputs.rows,
            seq_lens=inputs.seq_lens,
            query_lens=inputs.query_lens,
            positions=positions,
            out_slots=inputs.out_slots,
            slot_table=self.tables.slots,
            kv_pool=self.kv_pool,
        )
        batch.plan = self.backend.plan(batch)
        return self.model(inputs.token_ids, positions, batch)  # [num_tokens, hidden]

    def _sample(
        self, batch: ScheduledBatch, inputs: StepInputs, hidden: Tensor
    ) -> tuple[list[list[int]], dict[int, list[TokenLogprobs]]]:
        sampling = [i for i, is_sampling in enumerate(batch.is_sampling) if is_sampling]
        token_ids: list[list[int]] = [[] for _ in batch.rows]
        if not sampling:
            return token_ids, {}
        last = inputs.query_lens.cumsum()[sampling] - 1
        logits = self.model.logits(hidden[torch.from_numpy(last)])  # [n, vocab]
        rows, lengths = inputs.rows[sampling], inputs.seq_lens[sampling]
        sampled = sample(logits, [self._sampling_row(row, n) for row, n in zip(rows, lengths, strict=True)])
        self.tables.append(rows, lengths, sampled.token_ids)
        for i, token_id in zip(sampling, sampled.token_ids.tolist(), strict=True):
            token_ids[i].append(token_id)
        return token_ids, {sampling[j]: [entry] for j, entry in sampled.logprobs.items()}

    def _prompt_logprobs(
        self, batch: ScheduledBatch, inputs: StepInputs, hidden: Tensor
    ) -> dict[int, list[TokenLogprobs]]:
        found: dict[int, list[TokenLogprobs]] = {}
        ends = inputs.query_lens.cumsum()
        for i, row in enumerate(batch.rows):
            state = self._state(row)
            count = state.params.prompt_logprobs
            start = batch.starts[i]
            # Position p predicts the token at p + 1, which must still be part of the prompt.
            num_predicted = min(batch.num_new_tokens[i], state.num_prompt_tokens - 1 - start)
            if count is None or num_predicted <= 0:
                continue
            first = int(ends[i]) - batch.num_new_tokens[i]
            targets = self.tables.known_tokens(row, start + 1 + num_predicted)[start + 1 :]
            entries: list[TokenLogprobs] = []
            for a in range(0, num_predicted, PROMPT_LOGITS_ROWS):  # bounds the memory of the logits
                b = min(a + PROMPT_LOGITS_ROWS, num_predicted)
                logits = self.model.logits(hidden[first + a : first + b])
                entries += token_logprobs(logits, targets[a:b], [count] * (b - a))
            found[i] = entries
        return found

    def _sampling_row(self, row: int, num_tokens: int) -> SamplingRow:
        return SamplingRow(self._state(row), num_tokens, partial(self.tables.known_tokens, row, num_tokens))

    def _state(self, row: int) -> RowState:
        state = self.tables.states[row]
        assert state is not None, f"row {row} was scheduled without a request"
        return state
