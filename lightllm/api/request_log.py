"""Live requests and the last finished ones, for `/debug/requests` and the one log line per request.

Never holds prompt or output text. Owned by the frontend's event loop.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from lightllm.frontend.generation import Generation

logger = logging.getLogger("lightllm.request")


class RequestRecord:
    """One request to a generating route."""

    def __init__(self, request_id: str, label: str, route: str, generation: Generation) -> None:
        self.request_id = request_id
        self.label = label
        self.route = route
        self.generation = generation

    @property
    def state(self) -> str:
        """queued, decoding or done."""
        if self.generation.finished.done():
            return "done"
        return "decoding" if self.generation.first_s else "queued"

    def as_json(self, nodes: list[dict[str, Any]]) -> dict[str, Any]:
        """The published form.

        Args:
            nodes: what each node of a cluster did for it; empty where this node does all.
        """
        generation = self.generation
        start = generation.arrival_unix_s
        events: list[list[Any]] = [["queued", round(start, 3)]]
        if generation.first_s:
            events.append(["prefill_start", round(start + generation.queue_s, 3)])
            events.append(["first_token", round(start + generation.first_s - generation.arrival_s, 3)])
        if generation.end_s:
            events.append(["released", round(start + generation.end_s - generation.arrival_s, 3)])
        kv_tokens = generation.num_prompt_tokens + generation.num_output_tokens
        node: dict[str, Any] = {"node": "local", "role": "normal", "state": self._node_state()}
        if self.state != "done":
            node["kv_tokens"] = kv_tokens
        return {
            "id": self.request_id,
            "label": self.label or None,
            "route": self.route,
            "state": self.state,
            "prompt_tokens": generation.num_prompt_tokens,
            "cached_tokens": generation.num_cached_tokens,
            "output_tokens": generation.num_output_tokens,
            "finish_reason": generation.finish_reason,
            "deadline": round(generation.deadline_s, 3) if generation.deadline_s else None,
            "nodes": nodes or [{**node, "events": events}],
        }

    def _node_state(self) -> str:
        return {"queued": "waiting", "decoding": "running", "done": "released"}[self.state]


class RequestLog:
    """All live records, and a ring of finished ones as the JSON they had at their end.

    Args:
        ring: how many finished requests are kept.

    Attributes:
        nodes_of: what the nodes of a cluster did for a request id; nothing outside of a pd_master.
    """

    def __init__(self, ring: int) -> None:
        self.nodes_of: Callable[[str], list[dict[str, Any]]] = lambda request_id: []
        self._live: dict[str, RequestRecord] = {}
        self._done: deque[dict[str, Any]] = deque(maxlen=ring)

    def add(self, record: RequestRecord) -> None:
        """Take a request that has been submitted; it moves to the ring when its generation ends."""
        self._live[record.request_id] = record
        record.generation.finished.add_done_callback(lambda _: self._finish(record))

    def find(self, request_id: str) -> dict[str, Any] | None:
        """A live or finished request in its published form."""
        live = self._live.get(request_id)
        if live is not None:
            return self._as_json(live)
        return next((done for done in self._done if done["id"] == request_id), None)

    def listing(self, state: str | None, limit: int) -> list[dict[str, Any]]:
        """Newest first; `state` is live, done or None for both."""
        live = [] if state == "done" else list(reversed(self._live.values()))[:limit]
        done = [] if state == "live" else list(reversed(self._done))
        return [*(self._as_json(record) for record in live), *done][:limit]

    def _finish(self, record: RequestRecord) -> None:
        # The generation itself must go: its token ids are prompt text in another alphabet, and many.
        if self._live.pop(record.request_id, None) is not None:
            self._done.append(self._as_json(record))

    def _as_json(self, record: RequestRecord) -> dict[str, Any]:
        return record.as_json(self.nodes_of(record.request_id))


def log_request(
    request_id: str,
    label: str,
    route: str,
    status: int,
    code: str,
    duration_s: float,
    generation: Generation | None,
) -> None:
    """The one line of a finished request; `label` is the id that its client gave it."""
    parts = [f"{request_id} {route} status={status}"]
    if label:
        parts.append(f"label={label}")
    if code:
        parts.append(f"code={code}")
    if generation is not None:
        parts.append(
            f"finish={generation.finish_reason} prompt={generation.num_prompt_tokens} "
            f"cached={generation.num_cached_tokens} output={generation.num_output_tokens}"
        )
        if generation.first_s:
            parts.append(f"queue_ms={generation.queue_s * 1e3:.1f}")
            parts.append(f"ttft_ms={(generation.first_s - generation.arrival_s) * 1e3:.1f}")
    parts.append(f"total_ms={duration_s * 1e3:.1f}")
    logger.info(" ".join(parts))
