"""DeviceRunner: batches on a device that runs by itself, queued one behind the other.

`launch` stages a step's inputs, queues its kernels and the copies of its tokens, and returns; the tokens of a
step are on the device when the next one needs them, so several steps may be queued. Only the result of
`LaunchedStep` waits. Runs in the worker; knows rows and slots, never requests.
"""

import time
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightllm.attention.base import AttentionBackend
from lightllm.device.base import Device, Download, Moment
from lightllm.device.kv_pool import KVPool
from lightllm.messages import ScheduledBatch, StepOutput, TokenLogprobs
from lightllm.models.base import Model
from lightllm.worker.decode_graphs import DecodeGraphs
from lightllm.worker.device_sampler import DeviceSample, DeviceSampler
from lightllm.worker.device_tables import DeviceTables
from lightllm.worker.inputs import StepInputs
from lightllm.worker.model_runner import KVWritten, LaunchedStep, Runner, forward, prompt_logprobs_of
from lightllm.worker.prompt_graphs import PromptGraphs
from lightllm.worker.token_choice import OwnChoice, TokenChoice

NO_SLOTS = np.empty((0, 0), dtype=np.int32)


class DeviceRunner(Runner):
    """Runs batches on one device.

    Args:
        model, backend, kv_pool, tables: as for ModelRunner, on the device.
        graphs: computes decode batches; None: eagerly, without padding.
        prompt_graphs: computes small steps with prompts; None: eagerly, without padding.
        sampler, choice: choose and score tokens; None: this rank is the only one.
    """

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        kv_pool: KVPool,
        tables: DeviceTables,
        device: Device,
        graphs: DecodeGraphs | None,
        sampler: DeviceSampler | None = None,
        choice: TokenChoice | None = None,
        prompt_graphs: PromptGraphs | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        self.kv_pool = kv_pool
        self.tables = tables
        self.device = device
        self.graphs = graphs
        self.prompt_graphs = prompt_graphs
        self.sampler = sampler or DeviceSampler(tables, device)
        self.choice = choice or OwnChoice()
        self._last_done_s = 0.0

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Queue one step. Waits for the device only if a request asked for its prompt's log-probabilities."""
        started_s = time.perf_counter()
        self.tables.apply(batch)
        if not batch.rows:
            return LaunchedStep(lambda: StepOutput(step_id=batch.step_id, token_ids=[]))
        tensors = None if self.graphs is None else self.graphs.tensors_for(batch)
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        sample: DeviceSample | None = None
        kv_written: Moment | None = None
        if tensors is not None and self.graphs is not None:
            inputs = self.tables.inputs(batch, tensors)
            logits = self.graphs.run(tensors)
            lines = list(range(len(batch.rows)))
            sample = self._sample(logits[: len(lines)], inputs, lines)
            self.graphs.capture_next()
        else:
            inputs, hidden, kv_written = self._forward(batch)
            lines = [i for i, is_sampling in enumerate(batch.is_sampling) if is_sampling]
            if lines:
                sample = self._sample_eagerly(hidden, inputs, lines)
            if self.tables.columns.has_prompt_logprobs[inputs.rows].any():
                prompt_logprobs = prompt_logprobs_of(
                    batch, inputs, hidden, self.model, self.tables, self.choice
                )
            if self.prompt_graphs is not None:
                self.prompt_graphs.capture_next()
        fetched = () if sample is None else (sample.token_ids, *sample.logprobs)
        download = self.device.download(*fetched)
        return LaunchedStep(
            partial(self._collect, batch, lines, sample, download, prompt_logprobs, started_s),
            kv_written,
        )

    def _forward(self, batch: ScheduledBatch) -> tuple[StepInputs, Tensor, Moment | None]:
        """The inputs of a step that no decode graph computes, its hidden states, LaunchedStep.kv_written."""
        if self.prompt_graphs is not None:
            size = self.prompt_graphs.size_for(batch)
            if size is not None:
                return *self.prompt_graphs.run(batch, size), None
        inputs = self.tables.inputs(batch)
        written = KVWritten(self.device, self.model.config.num_hidden_layers)
        is_sent = any(not order.is_computed for order in batch.kv_sends)
        note = written.note if is_sent else None
        hidden = forward(self.model, self.backend, self.kv_pool, inputs, NO_SLOTS, note)
        return inputs, hidden, written.moment

    def _sample(self, logits: Tensor, inputs: StepInputs, lines: list[int]) -> DeviceSample:
        """Sample for all sequences of the batch."""
        assert inputs.index is not None
        n = len(lines)
        sample = self.sampler.sample(logits, inputs.rows, inputs.seq_lens)
        self.tables.append(inputs.index.rows[:n], inputs.index.seq_lens[:n], sample.token_ids)
        return sample

    def _sample_eagerly(self, hidden: Tensor, inputs: StepInputs, lines: list[int]) -> DeviceSample:
        """Sample behind the last token of some sequences of the batch."""
        if len(lines) == hidden.shape[0]:
            return self._sample(self.model.logits(hidden), inputs, lines)
        rows, lengths = inputs.rows[lines], inputs.seq_lens[lines]
        last = inputs.query_lens.cumsum()[lines] - 1
        width = -(-len(lines) // 4) * 4
        packed = np.zeros((3, width), dtype=np.int32)
        packed[:, : len(lines)] = (last, rows, lengths)
        uploaded = self.device.upload(packed)[:, : len(lines)]
        logits = self.model.logits(hidden.index_select(0, uploaded[0]))
        sample = self.sampler.sample(logits, rows, lengths)
        self.tables.append(uploaded[1], uploaded[2], sample.token_ids)
        return sample

    def _collect(
        self,
        batch: ScheduledBatch,
        lines: list[int],
        sample: DeviceSample | None,
        download: Download,
        prompt_logprobs: dict[int, list[TokenLogprobs]],
        started_s: float,
    ) -> StepOutput:
        token_ids: list[list[int]] = [[] for _ in batch.rows]
        logprobs: dict[int, list[TokenLogprobs]] = {}
        fetched = download.result()
        done_s = time.perf_counter()
        if sample is not None:
            for i, token_id in zip(lines, fetched[0].tolist(), strict=True):
                token_ids[i].append(token_id)
            logprobs = {lines[j]: [entry] for j, entry in sample.list_logprobs(fetched[1:]).items()}
        # Steps are queued, so a step begins when the one before it ends.
        duration_s = done_s - max(started_s, self._last_done_s)
        self._last_done_s = done_s
        return StepOutput(
            step_id=batch.step_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            duration_s=duration_s,
        )
