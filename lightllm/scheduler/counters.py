"""Counters: what the scheduler has done since the process began, as EngineStats reports it."""

from __future__ import annotations

from typing import Any

from lightllm.messages import ScheduledBatch, StepOutput
from lightllm.scheduler.request import Request


class Counters:
    """Growing totals, and numbers of the last step that computed something."""

    def __init__(self) -> None:
        self.num_preemptions = 0
        self.num_generated_tokens = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_steps = 0
        self._last_step = (0.0, 0, 0, "idle")

    def note_admission(self, request: Request) -> None:
        """A request enters its row for the first time."""
        self._num_cached_tokens += request.num_cached_tokens
        self._num_prompt_tokens += request.num_prompt_tokens

    def note_step(self, batch: ScheduledBatch, output: StepOutput, phase: str) -> None:
        """A step's result is here; one without rows only carried orders."""
        if batch.rows:
            self._num_steps += 1
            self._last_step = (output.duration_s, len(batch.rows), sum(batch.num_new_tokens), phase)

    def fields(self) -> dict[str, Any]:
        """The counters as fields of EngineStats."""
        duration_s, batch_size, num_tokens, phase = self._last_step
        return {
            "preemptions_total": self.num_preemptions,
            "prompt_tokens_total": self._num_prompt_tokens,
            "cached_tokens_total": self._num_cached_tokens,
            "generated_tokens_total": self.num_generated_tokens,
            "steps_total": self._num_steps,
            "step_duration_s": duration_s,
            "step_batch_size": batch_size,
            "step_num_tokens": num_tokens,
            "step_phase": phase,
        }
