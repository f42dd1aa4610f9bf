"""What a node sends to its master: everything, however large, and an error for what cannot be sent."""

from lightllm.frontend.node_agent import NodeAgent
from lightllm.frontend.node_directory import Node
from lightllm.messages import RequestOutput, TokenLogprobs
from tests.fakes import FakeEngineClient
from tests.pd.harness import TOKEN, Cluster, run, until

# About 1 KiB as msgpack.
ENTRY = TokenLogprobs(logprob=-1.0, top_ids=[300] * 80, top_logprobs=[-1.0] * 80)


def output(request_id: str, num_kib: int) -> RequestOutput:
    entries: list[TokenLogprobs | None] = [None, *[ENTRY] * num_kib]
    return RequestOutput(request_id=request_id, new_token_ids=[1], prompt_logprobs=entries)


def test_outputs_take_as_many_frames_as_they_need() -> None:
    async def test(cluster: Cluster) -> None:
        frames: list[list[RequestOutput]] = []

        def on_outputs(node: Node, outputs: list[RequestOutput]) -> None:
            frames.append(outputs)

        cluster.router.on_outputs = on_outputs  # type: ignore[method-assign]
        agent = NodeAgent(
            FakeEngineClient(), TOKEN.encode(), node_id="d", epoch=1, role="decode", address="x:1"
        )
        agent.follow({("127.0.0.1", cluster.port)})
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
        agent.leave("the test ends")

    run(test)
