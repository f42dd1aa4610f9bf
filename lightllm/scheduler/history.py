"""History: what happened to requests, for those who ask why one does not move.

Live requests carry their own events; of the latest that have ended the events are kept, and go on growing
while a transport still holds slots of theirs. Decides nothing. Runs in the engine process.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping

from lightllm.messages import RequestView
from lightllm.scheduler.request import Request

KEPT = 256


class History:
    """The last KEPT requests that have ended, by id."""

    def __init__(self) -> None:
        self._ended: OrderedDict[str, list[tuple[str, float]]] = OrderedDict()

    def add(self, request: Request, now_s: float) -> None:
        """A request has ended."""
        request.note("finished", now_s)
        self._ended[request.request_id] = request.events
        self._ended.move_to_end(request.request_id)
        if len(self._ended) > KEPT:
            self._ended.popitem(last=False)

    def views(self, request_ids: list[str], live: Mapping[str, Request]) -> list[RequestView]:
        """One view of each of these that is alive or known to have ended."""
        found = []
        for request_id in request_ids:
            if request_id in live:
                found.append(_view(live[request_id]))
            elif request_id in self._ended:
                events = self._ended[request_id]
                found.append(RequestView(request_id=request_id, state="finished", events=events))
        return found


def _view(request: Request) -> RequestView:
    return RequestView(
        request_id=request.request_id,
        state=request.state.name.lower(),
        num_tokens=len(request.token_ids),
        num_computed_tokens=request.num_computed_tokens,
        num_kv_tokens=len(request.slots),
        lease_until_s=None if request.lease_until_s == math.inf else request.lease_until_s,
        events=request.events,
    )
