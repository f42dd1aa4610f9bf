"""BatchColumns: the next ScheduledBatch while it is being composed; Step: one that has left.

Keeps the columns aligned, the step's token budget, and what each worker row already knows of its slots.
Decides nothing; belongs to one call of Scheduler.schedule().
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from lightllm.messages import NewRequest, ScheduledBatch
from lightllm.scheduler.request import Request
from lightllm.scheduler.transfers import Orders


class Step(NamedTuple):
    """A scheduled step whose result is not here yet; `requests` are aligned with the batch's columns."""

    batch: ScheduledBatch
    requests: list[Request]
    phase: str


class BatchColumns:
    """Columns of a batch (see ScheduledBatch), whose requests these are, and how many tokens may be added."""

    def __init__(self, max_tokens: int) -> None:
        self.num_tokens_left = max_tokens
        self.requests: list[Request] = []
        self.new_requests: list[NewRequest] = []
        self._starts: list[int] = []
        self._num_new_tokens: list[int] = []
        self._is_sampling: list[bool] = []
        self._slot_starts: list[int] = []
        self._slot_counts: list[int] = []
        self._slots = array("i")
        self._drafts: dict[int, list[int]] = {}

    def add_decodes(self, requests: list[Request], slots: list[int]) -> None:
        """Add one sampling position of each request: its slot is given, it is not counted as computed."""
        count = len(requests)
        starts = [request.num_computed_tokens for request in requests]
        self.requests += requests
        self.num_tokens_left -= count
        self._starts += starts
        self._num_new_tokens += [1] * count
        self._is_sampling += [True] * count
        if any(request.num_unsent_slots for request in requests):
            for request in requests:
                self._send_slots(request, 1)
        else:
            self._slot_starts += starts
            self._slot_counts += [1] * count
            self._slots.fromlist(slots)

    def add_drafted(self, request: Request, drafts: list[int]) -> None:
        """Add a sampling position of a request and the drafted ones behind it, as `add_chunk` does."""
        self._drafts[len(self.requests)] = drafts
        self.add_chunk(request, 1 + len(drafts), is_sampling=True)

    def add_chunk(self, request: Request, count: int, *, is_sampling: bool) -> None:
        """Add `count` positions of a request: they have slots, but are not counted as computed."""
        self.requests.append(request)
        self.num_tokens_left -= count
        self._starts.append(request.num_computed_tokens)
        self._num_new_tokens.append(count)
        self._is_sampling.append(is_sampling)
        self._send_slots(request, count)

    def chunks(self, first: int) -> list[tuple[Request, int]]:
        """Requests from the `first` on, each with the number of its positions."""
        return list(zip(self.requests[first:], self._num_new_tokens[first:], strict=True))

    def finish(self, step_id: int, freed_rows: list[int], orders: Orders) -> ScheduledBatch:
        """The batch; these columns must not be used any more."""
        return ScheduledBatch(
            step_id=step_id,
            new_requests=self.new_requests,
            freed_rows=freed_rows,
            rows=[request.row for request in self.requests],
            starts=self._starts,
            num_new_tokens=self._num_new_tokens,
            is_sampling=self._is_sampling,
            slot_starts=self._slot_starts,
            slot_counts=self._slot_counts,
            slots=self._slots,
            drafts=self._drafts,
            kv_sends=orders.sends,
            kv_recvs=orders.recvs,
            kv_cancels=orders.cancels,
        )

    def _send_slots(self, request: Request, num_new: int) -> None:
        """Send the new slots, and before them those that were swapped for the tree's or never sent."""
        count = num_new + request.num_unsent_slots
        start = len(request.slots) - count
        self._slot_starts.append(start)
        self._slot_counts.append(count)
        self._slots.extend(request.slots[start:])
        request.num_unsent_slots = 0
