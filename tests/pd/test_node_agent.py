"""What a node sends to its master: everything, however large, and an error for what cannot be sent."""

import asyncio

import msgspec
import pytest

from lightllm.frontend import node_agent
from lightllm.frontend.node_directory import Node
from lightllm.messages import RequestOutput, TokenLogprobs
from tests.fakes import FakeEngineClient
from tests.pd.fake_node import LAYOUT
from tests.pd.harness import Cluster, expected, run, until

# About 1 KiB as msgpack.
ENTRY = TokenLogprobs(logprob=-1.0, top_ids=[300] * 80, top_logprobs=[-1.0] * 80)


def output(request_id: str, num_kib: int) -> RequestOutput:
    entries: list[TokenLogprobs | None] = [None, *[ENTRY] * num_kib]
    return RequestOutput(request_id=request_id, new_token_ids=[1], prompt_logprobs=entries)


def fitting_engine() -> FakeEngineClient:
    """One that may stand beside the fake nodes."""
    info = FakeEngineClient().info
    assert info is not None
    return FakeEngineClient(info=msgspec.structs.replace(info, kv_layout=LAYOUT))


def test_outputs_take_as_many_frames_as_they_need() -> None:
    async def test(cluster: Cluster) -> None:
        frames: list[list[RequestOutput]] = []

        def on_outputs(node: Node, outputs: list[RequestOutput]) -> None:
            frames.append(outputs)

        cluster.router.on_outputs = on_outputs  # type: ignore[method-assign]
        agent = cluster.join("decode", "d", FakeEngineClient())
        await until(lambda: agent.is_registered)
        (link,) = agent._masters.values()
        for request in (output("a", 7000), output("b", 7000), output("c", 7000), output("d", 20_000)):
            link.on_output(request)
        await until(lambda: sum(map(len, frames)) == 4)
        found = {output.request_id: output for outputs in frames for output in outputs}
        assert len(frames) > 2
        assert [len(found[name].prompt_logprobs or []) for name in "abc"] == [7001] * 3
        assert found["d"].finish_reason == "error"
        assert found["d"].error is not None
        assert "too large for the link" in found["d"].error.message
        assert agent.is_registered

    run(test)


def test_outputs_of_the_last_moment_leave_before_the_good_bye() -> None:
    async def test(cluster: Cluster) -> None:
        seen: list[RequestOutput] = []

        def on_outputs(node: Node, outputs: list[RequestOutput]) -> None:
            seen.extend(outputs)

        cluster.router.on_outputs = on_outputs  # type: ignore[method-assign]
        agent = cluster.join("decode", "d", FakeEngineClient())
        await until(lambda: agent.is_registered)
        (link,) = agent._masters.values()
        link.on_output(output("a", 1))
        agent.leave("stopped")  # within the turn of the loop in which its last request has ended
        await until(lambda: not cluster.router.directory.all())
        assert [one.request_id for one in seen] == ["a"]

    run(test)


def test_a_node_whose_engine_hangs_is_lost_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_agent, "ENGINE_CHECK_S", 0.05)

    async def test(cluster: Cluster) -> None:
        cluster.start("decode", "other")
        await cluster.wait_for("other")
        engine = fitting_engine()
        engine.resumed.clear()
        agent = cluster.join("decode", "hangs", engine)
        await cluster.wait_for("other", "hangs")
        waiting = [asyncio.create_task(cluster.generate(f"prompt {i}", 9)) for i in range(6)]
        await until(lambda: bool(engine.requests))
        engine.fault = "engine: no answer for 6 s"
        replies = await asyncio.gather(*waiting)
        assert [reply.json()["generated_text"] for reply in replies] == [
            [expected(f"prompt {i}", 9)] for i in range(6)
        ]
        assert [node.node_id for node in cluster.router.directory.all()] == ["other"]
        assert len(engine.aborted) == len(engine.requests)
        (state,) = agent.states()
        assert "engine: no answer for 6 s" in state
        engine.fault = None
        await cluster.wait_for("other", "hangs")

    run(test)


def test_a_single_prefill_node_that_takes_nothing_is_done_without() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.start("decode", "d1")
        engine = fitting_engine()
        cluster.join("prefill", "p1", engine)
        await cluster.wait_for("d1", "p1")
        for node in cluster.router.directory.all():  # nothing is known against the pair
            cluster.router.probes.node_lost(node)
        engine.info = None  # its engine dies; the master has not heard of it yet
        reply = await cluster.generate("alone", 9)
        assert reply.json()["generated_text"] == [expected("alone", 9)]

    run(test)
