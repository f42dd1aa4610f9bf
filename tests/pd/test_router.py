"""A pd_master and fake nodes as processes: each token arrives exactly once, whatever happens to a node."""

import asyncio
import signal
import time

import pytest

from lightllm.frontend import node_directory, pd_router
from tests.pd.harness import Cluster, expected, run, until


async def pair(cluster: Cluster, **options) -> None:
    cluster.start("prefill", "p1", **options)
    cluster.start("decode", "d1", **options)
    await cluster.wait_for("p1", "d1")


def test_a_pair_answers_as_one_node_would() -> None:
    async def test(cluster: Cluster) -> None:
        assert (await cluster.client.get("/readiness")).status_code == 503
        await pair(cluster)
        await cluster.ready()
        reply = await cluster.generate("one prompt", 20)
        assert reply.json()["generated_text"] == [expected("one prompt", 20)]
        assert reply.json()["finish_reason"] == "length"
        assert (await cluster.stream("streamed", 30))[0] == expected("streamed", 30)
        assert (await cluster.generate("single", 1)).json()["generated_text"] == [expected("single", 1)]
        await cluster.idle()

    run(test)


def test_samples_share_a_prompt_and_logprobs_come_from_both_nodes() -> None:
    async def test(cluster: Cluster) -> None:
        await pair(cluster)
        await cluster.ready()
        reply = await cluster.generate("several", 8, n=3)
        assert reply.json()["generated_text"] == [expected("several", 8)] * 3
        body = {"model": "tiny", "prompt": "echo", "max_tokens": 5, "logprobs": 1, "echo": True}
        reply = await cluster.client.post("/v1/completions", json=body)
        choice = reply.json()["choices"][0]
        assert choice["text"] == "echo" + expected("echo", 5)
        assert len(choice["logprobs"]["token_logprobs"]) == 9
        await cluster.idle()

    run(test)


def test_many_streams_over_several_nodes() -> None:
    async def test(cluster: Cluster) -> None:
        for i in range(2):
            cluster.start("prefill", f"p{i}")
            cluster.start("decode", f"d{i}", num_slots=20000)
        await cluster.wait_for("p0", "p1", "d0", "d1")
        prompts = [f"prompt number {i}" for i in range(64)]
        texts = await asyncio.gather(*(cluster.stream(prompt, 40) for prompt in prompts))
        assert [text for text, _ in texts] == [expected(prompt, 40) for prompt in prompts]
        await cluster.idle()
        legs = [leg for node in cluster.router.directory.all() for leg in node.legs]
        assert not legs

    run(test)


def test_without_nodes_there_is_a_reason_and_without_prefill_nodes_decode_nodes_do_it() -> None:
    async def test(cluster: Cluster) -> None:
        reply = await cluster.generate("nobody", 4)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_nodes")
        assert reply.headers["retry-after"]
        cluster.start("decode", "d1")
        await cluster.wait_for("d1")
        assert (await cluster.client.get("/readiness")).status_code == 503
        assert (await cluster.generate("alone", 9)).json()["generated_text"] == [expected("alone", 9)]

    run(test)


def test_a_killed_decode_node_costs_no_token() -> None:
    async def test(cluster: Cluster) -> None:
        await pair(cluster, step_s=0.01)
        cluster.start("decode", "d2", step_s=0.01)
        await cluster.wait_for("p1", "d1", "d2")
        killed = []

        def kill(count: int) -> None:
            if count == 20 and not killed:
                holder = next(n.node_id for n in cluster.router.directory.of_role("decode") if n.legs)
                killed.append(holder)
                cluster.signal(holder, signal.SIGKILL)

        text, last = await cluster.stream("to be continued", 80, kill)
        assert killed
        assert text == expected("to be continued", 80)
        assert last["finish_reason"] == "length"
        await cluster.idle()

    run(test)


def test_a_killed_prefill_node_costs_only_time() -> None:
    async def test(cluster: Cluster) -> None:
        await pair(cluster, prefill_s=0.5)
        task = asyncio.create_task(cluster.generate("slow prompt", 10))
        await asyncio.sleep(0.25)
        cluster.signal("p1", signal.SIGKILL)
        reply = await task
        assert reply.json()["generated_text"] == [expected("slow prompt", 10)]
        await cluster.idle()

    run(test)


def test_a_transfer_that_fails_is_computed_by_the_decode_node() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.start("prefill", "p1", num_transfers=1)
        cluster.start("decode", "d1")
        await cluster.wait_for("p1", "d1")
        await cluster.ready()
        text, _ = await cluster.stream("no transfer", 12)
        assert text == expected("no transfer", 12)
        assert cluster.router.failovers == {"kv_transfer_failed": 1}
        await cluster.idle()

    run(test)


def test_a_pair_without_a_transfer_is_not_ready_and_requests_do_without_it() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.start("prefill", "p1", num_transfers=0)
        cluster.start("decode", "d1")
        await cluster.wait_for("p1", "d1")
        await until(lambda: bool(cluster.router.probes.as_json()[0]["fault"]))
        reply = await cluster.client.get("/readiness")
        assert reply.status_code == 503
        assert "p1 -> d1: p1: kv_transfer_failed" in reply.json()["message"]
        assert (await cluster.generate("solo", 7)).json()["generated_text"] == [expected("solo", 7)]

    run(test)


def test_the_last_decode_node_dies_and_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pd_router, "NODE_WAIT_S", 2.0)

    async def test(cluster: Cluster) -> None:
        await pair(cluster, step_s=0.01)
        start = time.monotonic()

        def kill(count: int) -> None:
            if count == 5:
                cluster.signal("d1", signal.SIGKILL)

        text, last = await cluster.stream("lost", 100, kill)
        assert expected("lost", 100).startswith(text)
        assert last["finish_reason"] == "error"
        assert last["error"]["code"] == "node_lost"
        assert 2 < time.monotonic() - start < 6

    run(test)


def test_another_decode_node_that_comes_in_time_goes_on() -> None:
    async def test(cluster: Cluster) -> None:
        await pair(cluster, step_s=0.01)

        def kill(count: int) -> None:
            if count == 5:
                cluster.signal("d1", signal.SIGKILL)
                cluster.start("decode", "d2")

        text, _ = await cluster.stream("saved", 60, kill)
        assert text == expected("saved", 60)

    run(test)


def test_new_requests_wait_for_nodes_that_are_expected_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_directory, "RETURN_S", 3.0)

    async def test(cluster: Cluster) -> None:
        await pair(cluster)
        cluster.signal("d1", signal.SIGKILL)
        await cluster.wait_for("p1")
        patient = asyncio.create_task(cluster.generate("patient", 9))
        await until(lambda: cluster.router.num_waiting == 1)
        assert (await cluster.client.get("/readiness")).status_code == 503
        cluster.start("decode", "d2")
        assert (await patient).json()["generated_text"] == [expected("patient", 9)]
        cluster.signal("d2", signal.SIGKILL)
        await cluster.wait_for("p1")
        await until(lambda: cluster.router.info is None)
        reply = await cluster.generate("too late", 9)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_nodes")

    run(test)


def test_a_frozen_node_is_lost_and_its_old_words_are_not_heard() -> None:
    async def test(cluster: Cluster) -> None:
        await pair(cluster, step_s=0.02)
        frozen: list[float] = []

        def freeze(count: int) -> None:
            if count == 10 and not frozen:
                frozen.append(time.monotonic())
                cluster.signal("d1", signal.SIGSTOP)
                cluster.start("decode", "d2")

        text, _ = await cluster.stream("cold", 60, freeze)
        assert text == expected("cold", 60)
        assert time.monotonic() - frozen[0] < 12
        cluster.signal("d1", signal.SIGCONT)
        await cluster.wait_for("p1", "d1", "d2")  # it comes back by itself, empty
        await cluster.idle()

    run(test)


def test_a_client_that_leaves_frees_both_nodes_at_once() -> None:
    async def test(cluster: Cluster) -> None:
        await pair(cluster, step_s=0.01, prefill_s=0.2)
        body = {"inputs": "leaving", "parameters": {"max_new_tokens": 400}}
        async with cluster.client.stream("POST", "/generate_stream", json=body) as reply:
            async for _ in reply.aiter_lines():
                break
        start = time.monotonic()
        while cluster.router._legs:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert time.monotonic() - start < 1
        await cluster.idle()

    run(test)


def test_a_full_decode_node_makes_requests_wait_and_none_is_refused() -> None:
    async def test(cluster: Cluster) -> None:
        await pair(cluster, num_slots=200)
        replies = await asyncio.gather(*(cluster.generate(f"wait {i}", 60) for i in range(8)))
        assert [reply.json()["generated_text"] for reply in replies] == [
            [expected(f"wait {i}", 60)] for i in range(8)
        ]
        await cluster.idle()

    run(test)


def test_prompts_that_wait_for_room_are_not_looked_up_in_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(cluster: Cluster) -> None:
        await pair(cluster, num_slots=170, step_s=0.015)
        await cluster.ready()
        hog = asyncio.create_task(cluster.generate("hog", 150))
        await until(lambda: any(leg.has_output for leg in cluster.router._legs.values()))
        patient = asyncio.create_task(cluster.generate("patient", 60))
        await until(lambda: cluster.router.num_waiting == 1)
        looked_up = []
        pick = cluster.router.directory.pick_prefill
        monkeypatch.setattr(
            cluster.router.directory, "pick_prefill", lambda *args: looked_up.append(args) or pick(*args)
        )
        for node in cluster.router.directory.all():
            node.full_until_s = time.monotonic() + 1.5
        await asyncio.sleep(1.0)  # several turns of the pump
        assert cluster.router.num_waiting == 1
        assert not looked_up
        assert (await hog).json()["generated_text"] == [expected("hog", 150)]
        assert (await patient).json()["generated_text"] == [expected("patient", 60)]
        assert looked_up

    run(test)


def test_no_reservation_in_time_is_429(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pd_router, "NODE_WAIT_S", 2.0)

    async def test(cluster: Cluster) -> None:
        await pair(cluster, num_slots=300, step_s=0.015)
        await cluster.ready()
        hog = asyncio.create_task(cluster.generate("hog", 280))
        await until(lambda: any(leg.has_output for leg in cluster.router._legs.values()))
        reply = await cluster.generate("patient", 100)
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert (await hog).json()["generated_text"] == [expected("hog", 280)]

    run(test)


def test_a_prompt_is_computed_while_slots_are_looked_for() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.start("prefill", "p1", prefill_s=1.0)
        cluster.start("decode", "d1", reserve_s=1.0, full_after_s=5.0)
        await cluster.wait_for("p1", "d1")
        await cluster.ready()
        start = time.monotonic()
        reply = await cluster.generate("at the same time", 6)
        assert time.monotonic() - start < 1.8, "of 2 s, one after the other"
        assert reply.json()["generated_text"] == [expected("at the same time", 6)]
        await cluster.idle()

    run(test)


def test_no_client_hears_of_a_token_before_there_are_slots() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.start("prefill", "p1")
        cluster.start("decode", "d1", reserve_s=0.5, full_after_s=5.0)
        await cluster.wait_for("p1", "d1")
        await cluster.ready()
        start, times = time.monotonic(), list[float]()
        text, _ = await cluster.stream("held", 6, lambda count: times.append(time.monotonic()))
        assert text == expected("held", 6)
        assert 0.5 <= times[0] - start < 1.5
        await cluster.idle()

    run(test)


def test_a_decode_node_that_is_fuller_than_it_looks_is_429_and_no_broken_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pd_router, "NODE_WAIT_S", 2.0)

    async def test(cluster: Cluster) -> None:
        cluster.start("prefill", "p1")
        cluster.start("decode", "d1", num_slots=300, num_hidden_slots=250)
        await cluster.wait_for("p1", "d1")
        await cluster.ready()
        body = {"inputs": "too much", "parameters": {"max_new_tokens": 100}}
        reply = await cluster.client.post("/generate_stream", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
        legs = cluster.router.describe(reply.headers["x-request-id"])
        assert any(leg["role"] == "prefill" for leg in legs), "it was tried"
        await cluster.idle()

    run(test)


def test_a_draining_node_finishes_what_it_has_and_gets_nothing_new() -> None:
    async def test(cluster: Cluster) -> None:
        await pair(cluster, step_s=0.02, drain_s=30.0)
        cluster.start("decode", "d2", step_s=0.02, drain_s=30.0)
        await cluster.wait_for("p1", "d1", "d2")
        await until(lambda: [pair["is_ready"] for pair in cluster.router.probes.as_json()] == [True] * 2)
        counts = [0]
        task = asyncio.create_task(cluster.stream("draining", 60, counts.append))
        await until(lambda: counts[-1] >= 3)  # the decode node's own
        holder = next(n.node_id for n in cluster.router.directory.of_role("decode") if n.legs)
        cluster.signal(holder, signal.SIGTERM)
        await until(lambda: holder not in [n.node_id for n in cluster.router.directory.of_role("decode")])
        assert (await cluster.generate("new", 5)).json()["generated_text"] == [expected("new", 5)]
        assert (await task)[0] == expected("draining", 60)
        assert not cluster.router.failovers
        await asyncio.to_thread(cluster.nodes[holder].wait, 30)
        assert cluster.nodes[holder].returncode == 0

    run(test)


def test_leases_are_renewed_while_a_transfer_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pd_router, "LEASE_RENEWAL_S", 0.5)

    async def test(cluster: Cluster) -> None:
        await pair(cluster, prefill_s=3.0, lease_s=2.0)
        reply = await cluster.generate("long prompt", 5)
        assert reply.json()["generated_text"] == [expected("long prompt", 5)]
        assert not cluster.router.failovers

    run(test)


def test_legs_are_shown_with_their_times() -> None:
    async def test(cluster: Cluster) -> None:
        await pair(cluster, step_s=0.05)  # the hand-over is heard of long before the last token
        reply = await cluster.generate("shown", 20)
        request_id = reply.headers["x-request-id"]
        shown = (await cluster.client.get(f"/debug/requests/{request_id}")).json()
        assert [(node["node"], node["role"]) for node in shown["nodes"]] == [
            ("pd_master", "pd_master"),
            ("d1", "decode"),
            ("p1", "prefill"),
        ]
        assert [event for event, _ in shown["nodes"][2]["events"]] == ["sent", "first token", "handed over"]
        page = (await cluster.client.get("/cluster", headers={"accept": "application/json"})).json()
        assert sorted(node["node"] for node in page["nodes"]) == ["d1", "p1"]

    run(test)


def test_a_prefill_node_that_dies_while_slots_are_awaited_leaves_none_behind() -> None:
    async def test(cluster: Cluster) -> None:
        await pair(cluster, num_slots=200, step_s=0.01, full_after_s=5.0)
        await cluster.ready()
        hog = asyncio.create_task(cluster.generate("hog", 150))
        await until(lambda: any(leg.has_output for leg in cluster.router._legs.values()))
        waiting = asyncio.create_task(cluster.generate("waiting", 100))
        await until(lambda: cluster.router.num_live == 2)
        cluster.signal("p1", signal.SIGKILL)
        assert (await hog).json()["generated_text"] == [expected("hog", 150)]
        assert (await waiting).json()["generated_text"] == [expected("waiting", 100)]
        await cluster.idle()

    run(test)
