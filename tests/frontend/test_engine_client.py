"""The engine link over real ipc sockets: delivery, isolation, death and return of the engine, health."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from lightllm import messages
from lightllm.errors import LightLLMError
from lightllm.frontend.engine_client import MAX_MESSAGES_PER_TURN, EngineClient, FinishRate
from lightllm.messages import (
    AbortAll,
    AbortRequest,
    EngineDown,
    EngineOutput,
    EngineRequest,
    EngineStats,
    EngineUp,
    Inspect,
    Inspected,
    Ping,
    Pong,
    RequestFailure,
    RequestOutput,
    RequestView,
    ToEngine,
)
from lightllm.sampling_params import SamplingParams
from tests.fakes import FakeEngineClient


class EngineEnd:
    """The engine's two sockets, and what came in."""

    def __init__(self, folder: Path, epoch: int) -> None:
        self.context = zmq.asyncio.Context()
        self.inbox = self.context.socket(zmq.PULL)
        self.outbox = self.context.socket(zmq.PUSH)
        self.address, self.reply_address = f"ipc://{folder}/e{epoch}", f"ipc://{folder}/f"
        self.inbox.bind(self.address)
        self.outbox.connect(self.reply_address)
        info = FakeEngineClient().info
        assert info is not None
        self.up = EngineUp(epoch=epoch, address=self.address, reply_address=self.reply_address, info=info)

    async def receive(self) -> ToEngine:
        return messages.decode(await asyncio.wait_for(self.inbox.recv(), 5), ToEngine)

    async def send(self, *outputs: RequestOutput) -> None:
        stats = EngineStats(requests_running=len(outputs), step_phase="decode")
        await self.outbox.send(messages.encode(EngineOutput(outputs=list(outputs), stats=stats)))

    def close(self) -> None:
        self.context.destroy(linger=0)


class Sink:
    def __init__(self, fails: bool = False) -> None:
        self.outputs: list[RequestOutput] = []
        self.fails = fails
        self.event = asyncio.Event()

    def on_output(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        self.event.set()
        if self.fails and output.error is None:
            raise ValueError("a bug")

    async def next(self) -> RequestOutput:
        await asyncio.wait_for(self.event.wait(), 5)
        self.event.clear()
        return self.outputs[-1]


def request(request_id: str) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_token_ids=[1], sampling_params=SamplingParams())


def run(test: Callable[[EngineClient, EngineEnd], Awaitable[None]], folder: Path) -> None:
    async def main() -> None:
        end, client = EngineEnd(folder, 0), EngineClient()
        try:
            client.connect(end.up)
            assert isinstance(await end.receive(), AbortAll)
            await asyncio.wait_for(test(client, end), 20)
        finally:
            client.close()
            end.close()

    asyncio.run(main())


def test_outputs_reach_their_sinks_and_bugs_stay_where_they_are(tmp_path: Path) -> None:
    async def test(client: EngineClient, end: EngineEnd) -> None:
        good, bad = Sink(), Sink(fails=True)
        for name, sink in (("good", good), ("bad", bad)):
            client.submit(request(name), sink)
            got = await end.receive()
            assert isinstance(got, EngineRequest)
            assert got.request_id == name
        await end.send(
            RequestOutput(request_id="bad", new_token_ids=[5]),
            RequestOutput(request_id="unknown", new_token_ids=[5]),
            RequestOutput(request_id="good", new_token_ids=[6], finish_reason="length"),
        )
        assert (await good.next()).new_token_ids == [6]
        assert bad.outputs[-1].error is not None
        assert bad.outputs[-1].error.code == "internal"
        assert await end.receive() == AbortRequest(request_id="bad")
        assert client.num_live == 0
        assert client.stats.step_phase == "decode"

    run(test, tmp_path)


def test_a_reader_that_is_behind_lets_others_have_their_turns(tmp_path: Path) -> None:
    async def test(client: EngineClient, end: EngineEnd) -> None:
        sink, num_messages = Sink(), 20 * MAX_MESSAGES_PER_TURN
        client.submit(request("r"), sink)
        outbox = zmq.Socket.shadow(end.outbox.underlying)
        for _ in range(num_messages):
            output = RequestOutput(request_id="r", new_token_ids=[1])
            outbox.send(messages.encode(EngineOutput(outputs=[output], stats=EngineStats())))
        time.sleep(0.2)  # noqa: ASYNC251 - everything arrives while the loop stands still
        num_turns = 0
        while len(sink.outputs) < num_messages:
            await asyncio.sleep(0)
            num_turns += bool(sink.outputs)
        assert num_turns >= num_messages // MAX_MESSAGES_PER_TURN

    run(test, tmp_path)


def test_a_dead_engine_fails_its_requests_and_the_next_one_serves(tmp_path: Path) -> None:
    async def test(client: EngineClient, end: EngineEnd) -> None:
        sink = Sink()
        client.submit(request("a"), sink)
        client.disconnect(EngineDown(epoch=0, reason="killed by SIGKILL", is_restarting=True))
        assert sink.outputs[-1].error is not None
        assert sink.outputs[-1].error.code == "engine_down"
        assert "SIGKILL" in sink.outputs[-1].error.message
        with pytest.raises(LightLLMError) as caught:
            client.submit(request("b"), sink)
        assert (caught.value.code, caught.value.retry_after_s) == ("engine_down", 5)
        assert await client.find_fault() == "engine: killed by SIGKILL"
        following = EngineEnd(tmp_path, 1)
        try:
            client.connect(following.up)
            assert isinstance(await following.receive(), AbortAll)
            client.disconnect(EngineDown(epoch=0, reason="late news", is_restarting=True))
            client.submit(request("c"), sink)
            await following.receive()
            sink.event.clear()
            await following.send(RequestOutput(request_id="c", new_token_ids=[1], finish_reason="stop"))
            assert (await sink.next()).new_token_ids == [1]
            assert client.restarts_total == 1
        finally:
            following.close()

    run(test, tmp_path)


def test_health_asks_only_after_silence_and_names_the_stuck_part(tmp_path: Path, monkeypatch) -> None:
    async def test(client: EngineClient, end: EngineEnd) -> None:
        assert await client.find_fault() is None
        monkeypatch.setattr("lightllm.frontend.engine_client.HEARD_LIMIT_S", 0.0)
        asked = asyncio.create_task(client.find_fault())
        ping = await end.receive()
        assert isinstance(ping, Ping)
        await end.outbox.send(messages.encode(Pong(nonce=ping.nonce, stats=EngineStats(kv_used_tokens=3))))
        assert await asked is None
        assert client.stats.kv_used_tokens == 3
        monkeypatch.setattr("lightllm.frontend.engine_client.PING_LIMIT_S", 0.05)
        await asyncio.sleep(0.1)
        assert "no answer" in str(await client.find_fault())

    run(test, tmp_path)


def test_pings_that_are_under_way_together_are_each_answered(tmp_path: Path) -> None:
    async def test(client: EngineClient, end: EngineEnd) -> None:
        asked = [asyncio.create_task(client.ping(2)) for _ in range(3)]
        pings = [await end.receive() for _ in asked]
        for ping, answered in zip(pings, asked, strict=True):
            assert isinstance(ping, Ping)
            await end.outbox.send(messages.encode(Pong(nonce=ping.nonce, stats=EngineStats())))
            assert await answered
        assert client._pongs == {}

    run(test, tmp_path)


def test_a_busy_engine_has_less_time_and_steps_count_once(tmp_path: Path, monkeypatch) -> None:
    async def test(client: EngineClient, end: EngineEnd) -> None:
        seen: list[EngineStats] = []
        client._on_stats = seen.append
        sink = Sink()
        client.submit(request("a"), sink)
        step = EngineStats(steps_total=1, step_duration_s=0.01, step_num_tokens=1, step_phase="prefill")
        for outputs in ([RequestOutput(request_id="a", new_token_ids=[5])], []):
            await end.outbox.send(messages.encode(EngineOutput(outputs=outputs, stats=step)))
        await sink.next()
        await asyncio.sleep(0.05)
        assert seen == [step]
        monkeypatch.setattr("lightllm.frontend.engine_client.HEARD_LIMIT_S", 0.0)
        monkeypatch.setattr("lightllm.frontend.engine_client.BUSY_PING_LIMIT_S", 0.05)
        began = asyncio.get_running_loop().time()
        assert "no answer" in str(await client.find_fault())
        assert asyncio.get_running_loop().time() - began < 1

    run(test, tmp_path)


def test_an_engine_is_asked_and_may_be_silent(tmp_path: Path) -> None:
    async def test(client: EngineClient, end: EngineEnd) -> None:
        view = RequestView(request_id="a", state="running")
        asking = asyncio.create_task(client.inspect(["a", "b"], 5))
        question = await end.receive()
        assert question == Inspect(nonce=1, request_ids=["a", "b"])
        for nonce in (7, 1, 1):  # another question's, this one's, once more
            await end.outbox.send(messages.encode(Inspected(nonce=nonce, views=[view])))
        assert await asking == [view]
        assert await client.inspect(["a"], 0.05) is None
        await end.send()  # the reader is well
        while client.stats.step_phase != "decode":  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    run(test, tmp_path)


def test_refusals_make_no_room(tmp_path: Path) -> None:
    async def test(client: EngineClient, end: EngineEnd) -> None:
        client.stats = EngineStats(requests_waiting=50)
        sink = Sink()
        for name in ("a", "b", "c"):
            client.submit(request(name), sink)
        failure = RequestFailure(code="queue_full", message="full")
        await end.send(
            *(RequestOutput(request_id=name, finish_reason="error", error=failure) for name in ("a", "b"))
        )
        await sink.next()
        assert client._rate._times == deque()
        client.abort("c")
        assert len(client._rate._times) == 1

    run(test, tmp_path)


def test_a_damaged_message_is_dropped(tmp_path: Path) -> None:
    async def test(client: EngineClient, end: EngineEnd) -> None:
        sink = Sink()
        client.submit(request("a"), sink)
        await end.outbox.send(b"\xc1 not msgpack")
        await end.send(RequestOutput(request_id="a", new_token_ids=[2]))
        assert (await sink.next()).new_token_ids == [2]

    run(test, tmp_path)


def test_loading_is_not_down() -> None:
    async def main() -> None:
        client = EngineClient()
        with pytest.raises(LightLLMError) as caught:
            client.require_up()
        assert caught.value.code == "loading"
        assert await client.find_fault() == "engine: loading"
        client.close()

    asyncio.run(main())


def test_retry_after_follows_the_measured_rate(monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr("lightllm.frontend.engine_client.time.monotonic", lambda: now)
    rate = FinishRate()
    assert rate.wait_s(100) == 1
    for _ in range(10):
        now += 1.0
        rate.add()
    assert rate.wait_s(20) == pytest.approx(20, abs=3)
    assert rate.wait_s(1000) == 60
