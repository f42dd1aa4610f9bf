"""Choose tokens on a device without waiting for it: what sampler.py does, by kernels for all rows at once.

Noise is made on the host from the same counters; filters and penalties are kernels; the remaining processors
are those of sampler.py. Log-probabilities are fetched together with the tokens. Runs in the worker.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightllm.device.base import Device
from lightllm.distributed.collectives import Collectives
from lightllm.kernels.penalties import penalise_
from lightllm.kernels.sample import sample_tokens
from lightllm.messages import TokenLogprobs
from lightllm.worker.device_tables import DeviceTables
from lightllm.worker.sampler import (
    MIN_PENALTY,
    PIPELINE,
    RowState,
    SamplingRow,
    counter_uniform,
    list_logprobs,
    logprob_tensors,
    penalise_row,
)

# The largest float32 below 1: noise must stay below it when rounded.
MAX_NOISE = np.float32(1 - 2**-24)


@dataclass(frozen=True, slots=True)
class DeviceSample:
    """Sampled tokens, and log-probabilities of the rows that asked, all on the device.

    Attributes:
        token_ids: [n] int64.
        logprobs: what `logprob_tensors` makes, of the rows `lines`; empty if none asked.
        lines, counts: which rows asked, and for how many alternatives.
    """

    token_ids: Tensor
    logprobs: tuple[Tensor, ...] = ()
    lines: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()

    def list_logprobs(self, fetched: tuple[np.ndarray, ...]) -> dict[int, TokenLogprobs]:
        """By line, once they are on the host."""
        if not self.lines:
            return {}
        return dict(zip(self.lines, list_logprobs(fetched, list(self.counts)), strict=True))


class DeviceSampler:
    """Samples for rows of the given tables."""

    def __init__(self, tables: DeviceTables, device: Device) -> None:
        self.tables = tables
        self.device = device

    def sample(self, logits: Tensor, rows: np.ndarray, lengths: np.ndarray) -> DeviceSample:
        """Choose one token per row.

        Args:
            logits: [n, vocab_size] float32; changed in place.
            rows, lengths: [n] row and number of tokens of each request.
        """
        columns = self.tables.columns
        if columns.is_plain[rows].all():
            return DeviceSample(logits.argmax(dim=-1))
        lines = np.flatnonzero(columns.has_logprobs[rows])
        raw = logits[self.device.upload(lines)] if len(lines) else None
        if columns.has_processors[rows].any():
            self._process(logits, rows, lengths)
        filters = columns.filters[:, rows]
        if filters[0].any():
            noise = counter_uniform(
                columns.seed[rows], columns.sample_index[rows], lengths - columns.num_prompt_tokens[rows]
            )
            packed = np.concatenate([filters, np.minimum(noise.astype(np.float32), MAX_NOISE)[None]])
            uploaded = self.device.upload(np.ascontiguousarray(packed))
            token_ids = sample_tokens(logits, uploaded[:4], uploaded[4])
        else:
            token_ids = logits.argmax(dim=-1)
        if raw is None:
            return DeviceSample(token_ids)
        counts = tuple(self._state(row).params.logprobs or 0 for row in rows[lines])
        tensors = logprob_tensors(raw, token_ids[self.device.upload(lines)], max(counts))
        return DeviceSample(token_ids, tensors, tuple(lines.tolist()), counts)

    def _process(self, logits: Tensor, rows: np.ndarray, lengths: np.ndarray) -> None:
        """The pipeline in its order, with the penalties of all rows in one go."""
        lines = np.flatnonzero(self.tables.columns.has_processors[rows])
        states = {int(i): self._state(rows[i]) for i in lines}
        for applies, process in PIPELINE:
            active = [i for i, state in states.items() if applies(state.params)]
            if not active:
                continue
            if process is penalise_row:
                self._penalise(logits, active, states, rows, lengths)
                continue
            for i in active:
                read = partial(self.tables.known_tokens, int(rows[i]), int(lengths[i]))
                process(logits[i], SamplingRow(states[i], int(lengths[i]), read))

    def _penalise(
        self,
        logits: Tensor,
        active: list[int],
        states: dict[int, RowState],
        rows: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        params = [states[i].params for i in active]
        starts = [0 if states[i].params.input_penalty else states[i].num_prompt_tokens for i in active]
        spans = np.stack([rows[active], starts, lengths[active]], axis=1).astype(np.int32)
        weights = [
            (max(p.repetition_penalty, MIN_PENALTY), p.presence_penalty, p.frequency_penalty) for p in params
        ]
        penalise_(
            logits,
            self.device.upload(np.array(active, dtype=np.int32)),
            self.tables.token_ids,
            self.device.upload(spans),
            self.device.upload(np.array(weights, dtype=np.float32)),
            int(lengths[active].max()),
        )

    def _state(self, row: int) -> RowState:
        state = self.tables.states[row]
        assert state is not None, f"row {row} was scheduled without a request"
        return state


class LeadingSampler(DeviceSampler):
    """Samples where several ranks compute the model, and tells the others; see token_choice.py."""

    def __init__(self, tables: DeviceTables, device: Device, collectives: Collectives) -> None:
        super().__init__(tables, device)
        self.collectives = collectives

    def sample(self, logits: Tensor, rows: np.ndarray, lengths: np.ndarray) -> DeviceSample:
        sampled = super().sample(logits, rows, lengths)
        self.collectives.broadcast(sampled.token_ids)
        return sampled


class FollowingSampler(DeviceSampler):
    """Hears what the leader has sampled."""

    def __init__(self, tables: DeviceTables, device: Device, collectives: Collectives) -> None:
        super().__init__(tables, device)
        self.collectives = collectives

    def sample(self, logits: Tensor, rows: np.ndarray, lengths: np.ndarray) -> DeviceSample:
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=self.device.torch_device)
        self.collectives.broadcast(token_ids)
        return DeviceSample(token_ids)


def make_sampler(
    rank: int, size: int, tables: DeviceTables, device: Device, collectives: Collectives
) -> DeviceSampler:
    """The one of that rank."""
    if size == 1:
        return DeviceSampler(tables, device)
    return (FollowingSampler if rank else LeadingSampler)(tables, device, collectives)
