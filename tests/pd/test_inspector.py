"""What master and nodes know of a request, in one table: asked for, or logged when it does not move."""

import asyncio
import json
import logging
import signal
import time
from typing import Any

import pytest

from lightllm.frontend import pd_inspector
from tests.pd.harness import Cluster, expected, run, until


async def begin(cluster: Cluster, prompt: str, num_tokens: int) -> tuple[asyncio.Task[Any], str]:
    """Send a request and wait until a decode node has it; the task and the request's id."""
    known = set(cluster.router._requests)
    task = asyncio.create_task(cluster.generate(prompt, num_tokens))
    await until(lambda: any(name.startswith("req_") for name in set(cluster.router._requests) - known))
    (name,) = (name for name in set(cluster.router._requests) - known if name.startswith("req_"))
    return task, name.partition("/")[0]


async def nodes_of(cluster: Cluster, request_id: str) -> dict[str, dict[str, Any]]:
    reply = await cluster.client.get(f"/debug/requests/{request_id}")
    return {node["node"]: node for node in reply.json()["nodes"]}


def test_nodes_are_asked_for_their_own_view() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.start("prefill", "p1", prefill_s=1.0)
        cluster.start("decode", "d1")
        await cluster.wait_for("p1", "d1")
        task, request_id = await begin(cluster, "look at me", 5)
        await until(lambda: any("reserved" in leg.state for leg in cluster.router._legs.values()))
        nodes = await nodes_of(cluster, request_id)
        assert list(nodes) == ["pd_master", "d1", "p1"]
        assert "own" not in nodes["pd_master"]
        assert (nodes["d1"]["state"], nodes["d1"]["own"]["state"]) == ("reserved", "receiving")
        assert nodes["d1"]["own"]["kv_tokens"] == len("look at me") + 5
        assert (nodes["p1"]["state"], nodes["p1"]["own"]["state"]) == ("sent", "running")
        assert abs(nodes["p1"]["own"]["events"][0][1] - time.time()) < 30
        listed = (await cluster.client.get("/debug/requests?state=live")).json()["requests"]
        assert [node.get("own", {}).get("state") for node in listed[0]["nodes"]] == [
            None,
            "receiving",
            "running",
        ]
        await task
        # Afterwards too; these engines forget at once.
        nodes = await nodes_of(cluster, request_id)
        assert {nodes[name]["own"]["state"] for name in ("d1", "p1")} == {"not known there"}

    run(test)


def test_a_node_that_does_not_answer_is_shown_as_such() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.start("prefill", "p1", prefill_s=3.0, is_deaf=True)
        cluster.start("decode", "d1")
        await cluster.wait_for("p1", "d1")
        task, request_id = await begin(cluster, "quiet", 5)
        await until(lambda: any("reserved" in leg.state for leg in cluster.router._legs.values()))
        nodes = await nodes_of(cluster, request_id)
        assert nodes["p1"]["own"] == {"state": "its engine does not answer within 0.8 s"}
        assert nodes["d1"]["own"]["state"] == "receiving"
        cluster.signal("d1", signal.SIGSTOP)
        start = time.monotonic()
        nodes = await nodes_of(cluster, request_id)
        assert 0.9 < time.monotonic() - start < 2
        assert nodes["d1"]["own"] == {"state": "no answer within 1 s"}
        cluster.signal("d1", signal.SIGCONT)
        assert (await task).json()["generated_text"] == [expected("quiet", 5)]
        cluster.signal("d1", signal.SIGKILL)
        await cluster.wait_for("p1")
        assert (await nodes_of(cluster, request_id))["d1"]["own"] == {"state": "the node has gone"}

    run(test)


def test_one_that_does_not_move_reports_itself_once_with_that_table(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pd_inspector, "STUCK_AFTER_S", 0.7)

    async def test(cluster: Cluster) -> None:
        cluster.start("prefill", "p1", prefill_s=3.0)
        cluster.start("decode", "d1")
        await cluster.wait_for("p1", "d1")
        await asyncio.sleep(3.5)  # the probe has its own slow prompt
        with caplog.at_level(logging.WARNING, logger="lightllm.frontend.pd_inspector"):
            task, request_id = await begin(cluster, "stuck", 5)
            assert (await task).json()["generated_text"] == [expected("stuck", 5)]
        found = [record.getMessage() for record in caplog.records if request_id in record.getMessage()]
        assert len(found) == 1
        head, _, table = found[0].partition(": ")
        assert head.startswith(f"request {request_id}")
        assert head.endswith("has not moved for 1 s")
        shown = {entry["node"]: entry for entry in json.loads(table)}
        assert list(shown) == ["pd_master", "d1", "p1"]
        assert [shown[name]["own"]["state"] for name in ("d1", "p1")] == ["receiving", "running"]

    run(test)
