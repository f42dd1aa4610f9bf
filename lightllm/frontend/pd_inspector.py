"""Asks nodes what they themselves know of a request, for `/debug/requests` and when one does not move.

Every wait is bounded; a node that does not answer is shown as such. Never changes a request. Runs in the
frontend's event loop of a pd_master.
"""

import asyncio
import json
import logging
import time
from collections.abc import Collection
from typing import Any

import msgspec

from lightllm.frontend.node_directory import Node, NodeDirectory
from lightllm.frontend.pd_request import RoutedRequest
from lightllm.messages import Inspect, Inspected, RequestView

logger = logging.getLogger(__name__)

ANSWER_LIMIT_S = 1.0
STUCK_AFTER_S = 10.0

Entry = dict[str, Any]
"""What the router knows of one leg, or of the master's part: see `RoutedRequest.describe`."""


class Inspector:
    """Questions to nodes, and their answers.

    Args:
        directory: the nodes that can be asked.
    """

    def __init__(self, directory: NodeDirectory) -> None:
        self._directory = directory
        self._nonce = 0
        self._open: dict[tuple[str, int], asyncio.Future[Inspected]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def answered(self, node: Node, answer: Inspected) -> None:
        """A node has answered; too late is no error."""
        future = self._open.get((node.node_id, answer.nonce))
        if future is not None and not future.done():
            future.set_result(answer)

    async def complete(self, entries: list[Entry]) -> list[Entry]:
        """The same entries; to those of legs comes, under `own`, what their nodes say in ANSWER_LIMIT_S."""
        legs: dict[str, list[str]] = {}
        for entry in entries:
            if "leg" in entry:
                legs.setdefault(entry["node"], []).append(entry["leg"])
        answers = await asyncio.gather(*(self._ask(*item) for item in legs.items()))
        own = {leg: view for answer in answers for leg, view in answer.items()}
        return [{**entry, "own": own[entry["leg"]]} if "leg" in entry else entry for entry in entries]

    def report_stuck(self, requests: Collection[RoutedRequest]) -> None:
        """Log, once for each, the requests to which nothing has happened for STUCK_AFTER_S."""
        now = time.monotonic()
        stuck = [routed for routed in requests if routed.is_stuck(now, STUCK_AFTER_S)]
        if stuck:
            task = asyncio.get_running_loop().create_task(self._report(stuck))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _report(self, stuck: list[RoutedRequest]) -> None:
        tables = [routed.describe() for routed in stuck]
        entries = iter(await self.complete([entry for table in tables for entry in table]))
        for routed, table in zip(stuck, tables, strict=True):
            shown = json.dumps([next(entries) for _ in table])
            name = routed.request.request_id
            logger.warning("request %s has not moved for %.0f s: %s", name, STUCK_AFTER_S, shown)

    async def _ask(self, node_id: str, legs: list[str]) -> dict[str, Entry]:
        """What a node says of these legs, by leg."""
        node = self._directory.get(node_id)
        if node is None:
            return _unknown(legs, "the node has gone")
        self._nonce += 1
        key = node_id, self._nonce
        future = self._open[key] = asyncio.get_running_loop().create_future()
        node.send(Inspect(nonce=self._nonce, request_ids=legs))
        try:
            await asyncio.wait({future}, timeout=ANSWER_LIMIT_S)
        finally:
            del self._open[key]
        if not future.done():
            return _unknown(legs, f"no answer within {ANSWER_LIMIT_S:g} s")
        answer = future.result()
        views = {view.request_id: _shown(view) for view in answer.views}
        return _unknown(legs, answer.fault or "not known there") | views


def _unknown(legs: list[str], why: str) -> dict[str, Entry]:
    return {leg: {"state": why} for leg in legs}


def _shown(view: RequestView) -> Entry:
    """The published form of a node's view."""
    fields = msgspec.structs.asdict(view)
    fields["events"] = [[name, round(time_s, 3)] for name, time_s in view.events]
    lease_s = fields.pop("lease_until_s")
    if lease_s is not None:
        fields["lease_until"] = round(lease_s, 3)
    del fields["request_id"]
    if view.state == "finished":  # its numbers are gone with it
        return {"state": view.state, "events": fields["events"]}
    return {name.removeprefix("num_"): value for name, value in fields.items()}
