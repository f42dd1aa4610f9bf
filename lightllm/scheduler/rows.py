"""Rows: which request is in which row of the worker's tables, and what the worker has been told of it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from lightllm.messages import NewRequest
from lightllm.scheduler.request import Request


class Rows:
    """Free rows, and those given up of which the worker still has to hear.

    Attributes:
        num_committed_tokens: sum of `max_num_tokens` over all requests in rows.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._free = list(range(num_rows))
        self._to_announce: set[int] = set()
        self.num_committed_tokens = 0

    @property
    def num_free(self) -> int:
        """How many requests could enter."""
        return len(self._free)

    def enter(self, request: Request) -> None:
        """Give a request the lowest free row; the worker need not know it yet."""
        request.row = heapq.heappop(self._free)
        self.num_committed_tokens += request.max_num_tokens

    def leave(self, request: Request) -> None:
        """Take the request's row, if it has one; the next batch may have it for another one."""
        if request.row < 0:
            return
        if request.is_in_row:
            self._to_announce.add(request.row)
        self.num_committed_tokens -= request.max_num_tokens
        heapq.heappush(self._free, request.row)
        request.row, request.is_in_row = -1, False

    def take_freed(self, new_requests: list[NewRequest]) -> list[int]:
        """Rows to announce as free with a batch in which these requests enter."""
        freed = sorted(self._to_announce.difference(new.row for new in new_requests))
        self._to_announce.clear()
        return freed

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Check that each row is free or one request's.

        Args:
            requests: all that may have rows.
        """
        entered = [request for request in requests if request.row >= 0]
        rows = sorted([*self._free, *(request.row for request in entered)])
        assert rows == list(range(self._num_rows)), (
            f"rows free or used are {rows}, expected 0..{self._num_rows - 1}"
        )
        committed, counter = sum(r.max_num_tokens for r in entered), self.num_committed_tokens
        assert committed == counter, f"{committed} tokens are committed, counter says {counter}"
