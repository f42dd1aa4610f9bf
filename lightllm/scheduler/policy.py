"""In which order waiting requests are admitted.

A policy is a function from a request to a number; smaller goes first. Ageing is part of the number and needs
no clock: a level of priority is worth `AGEING_S` seconds of earlier arrival, so that a request is overtaken
only by those that arrive within a bounded time after it, and a heap never has to be sorted again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from types import MappingProxyType

from lightllm.scheduler.cache import NullPrefixCache
from lightllm.scheduler.request import Request, RequestState

AGEING_S = 30.0
"""Waiting this long weighs as much as one level of priority."""

PREFILL_S_PER_TOKEN = 0.01
"""With shortest_prefill: an uncached prompt token weighs as much as arriving so much later."""

Policy = Callable[[Request, NullPrefixCache], float]


def urgency(request: Request) -> float:
    """Priority, then arrival; smaller is more urgent. Also decides who is preempted last."""
    return request.arrival_s - request.priority * AGEING_S


def fcfs(request: Request, cache: NullPrefixCache) -> float:
    """First come, first served."""
    return urgency(request)


def shortest_prefill(request: Request, cache: NullPrefixCache) -> float:
    """Those first that need the least computation before their next token."""
    return urgency(request) + PREFILL_S_PER_TOKEN * (len(request.token_ids) - cache.match_length(request))


POLICIES: Mapping[str, Policy] = MappingProxyType({"fcfs": fcfs, "shortest_prefill": shortest_prefill})


class WaitingQueue:
    """Requests that could be admitted, best first; those that finish meanwhile disappear by themselves.

    Also holds siblings, which may not be admitted before the prompt that they share is computed.
    """

    def __init__(self, policy: Policy, cache: NullPrefixCache) -> None:
        self._policy = policy
        self._cache = cache
        self._heap: list[tuple[float, tuple[float, int], Request]] = []
        self._sweep_size = 64
        self._held: dict[str, list[Request]] = {}

    def hold(self, request: Request, leader: Request) -> None:
        """Keep a request until the prompt of another one is computed."""
        self._held.setdefault(leader.request_id, []).append(request)

    def take_held(self, leader: Request) -> list[Request]:
        """Those that were held for this request and still live; they are to be pushed now."""
        held = self._held.pop(leader.request_id, ())
        return [request for request in held if request.state is RequestState.WAITING]

    def push(self, request: Request) -> None:
        """Put a waiting request in its place."""
        heapq.heappush(self._heap, (self._policy(request, self._cache), request.rank, request))
        if len(self._heap) > self._sweep_size:
            self._heap = [entry for entry in self._heap if entry[2].state is RequestState.WAITING]
            heapq.heapify(self._heap)
            self._sweep_size = 64 + 2 * len(self._heap)

    def peek(self) -> Request | None:
        """The request to admit next."""
        while self._heap and self._heap[0][2].state is not RequestState.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Request:
        """Take out the request that `peek` has just returned."""
        return heapq.heappop(self._heap)[2]
