"""The engine's loop while KV is on its way: it waits without spinning, and hears of the end."""

from concurrent.futures import Future

from lightllm.engine.core import IDLE_WAIT_S, TRANSFER_WAIT_S, Engine
from lightllm.engine.executor import Executor
from lightllm.messages import (
    AbortRequest,
    EngineOutput,
    EngineRequest,
    Inspect,
    Inspected,
    KVReserved,
    KVSource,
    KVTransfer,
    RenewLeases,
)
from lightllm.sampling_params import SamplingParams
from lightllm.scheduler.config import SchedulerConfig
from lightllm.scheduler.scheduler import Scheduler
from tests.scheduler.fake_worker import FakeWorker, expected_output

CONFIG = SchedulerConfig(
    num_slots=200, max_running=4, batch_max_tokens=32, chunked_prefill_size=32, max_req_total_len=100
)
PROMPT = [1, 2, 3] * 5
PARAMS = SamplingParams(max_new_tokens=4, ignore_eos=True)
RECEIVING = EngineRequest(
    request_id="r",
    prompt_token_ids=PROMPT,
    sampling_params=PARAMS,
    recv_kv_from=KVSource(node_id="P", epoch=1, ticket="t"),
)


class FakeExecutor(Executor):
    """Computes at once, by the scheduler tests' worker."""

    def __init__(self):
        self.worker = FakeWorker(CONFIG, pace=0.0)
        self.batches = []

    def submit(self, batch):
        self.batches.append(batch)
        done = Future()
        done.set_result(self.worker.run(batch))
        return done

    def info(self):
        raise NotImplementedError

    def close(self):
        return


class RecordingLink:
    """Remembers how long the engine would have waited, and what it sent."""

    def __init__(self):
        self.inbox, self.sent, self.waits = [], [], []

    def receive(self, timeout_s):
        self.waits.append(timeout_s)
        inbox, self.inbox = self.inbox, []
        return inbox

    def send(self, message):
        self.sent.append(message)

    def wake(self):
        raise AssertionError("nobody has asked for it")


def make_engine(**fields):
    """An engine, and what it computes and says by."""
    executor, link = FakeExecutor(), RecordingLink()
    return Engine(Scheduler(CONFIG, seed=1), executor, link, **fields), executor, link


def test_an_engine_that_only_receives_waits_and_asks_and_then_decodes():
    now = [1000.0]
    engine, executor, link = make_engine(clock=lambda: now[0])
    engine.step()
    assert link.waits == [IDLE_WAIT_S]
    link.inbox.append(RECEIVING)
    engine.step()
    assert link.sent == [KVReserved(request_id="r", num_cached_tokens=0)]
    for _ in range(50):
        engine.step()
    assert set(link.waits[2:]) == {TRANSFER_WAIT_S}, "neither spinning nor asleep"
    assert len(link.sent) == 1, "a batch that only asks is no step to be heard of"
    now[0] += 29
    link.inbox.append(RenewLeases(request_ids=["r"]))
    engine.step()
    now[0] += 29  # 58 s after arrival
    executor.worker.transport.pace = 1.0
    num_waits = len(link.waits)
    while not (link.sent[-1].outputs and link.sent[-1].outputs[-1].finish_reason) if link.sent[1:] else True:
        engine.step()
    assert set(link.waits[num_waits + 1 :]) == {0.0}, "nothing to wait for between decodes"
    outputs = [
        output for message in link.sent if isinstance(message, EngineOutput) for output in message.outputs
    ]
    assert [token for output in outputs for token in output.new_token_ids] == expected_output(PROMPT, PARAMS)[
        0
    ][1:]
    assert outputs[-1].finish_reason == "length"
    ended = [
        one for message in link.sent if isinstance(message, EngineOutput) for one in message.kv_transfers
    ]
    assert ended == [KVTransfer(request_id="r", direction="received", transport="fake")]
    while engine.pending:
        engine.step()
    engine.step()
    assert link.waits[-1] == IDLE_WAIT_S


def test_a_transfer_that_ends_behind_its_request_is_told_of():
    engine, executor, link = make_engine()
    link.inbox.append(RECEIVING)
    engine.step()
    link.inbox.append(AbortRequest(request_id="r"))
    executor.worker.transport.pace = 1.0
    for _ in range(5):
        engine.step()
    messages = [message for message in link.sent if isinstance(message, EngineOutput)]
    assert [one.request_id for message in messages for one in message.kv_transfers] == ["r"]
    assert [output.finish_reason for message in messages for output in message.outputs] == ["abort"]


def test_questions_are_answered_between_steps():
    engine, _, link = make_engine()
    link.inbox += [
        EngineRequest(request_id="r", prompt_token_ids=PROMPT, sampling_params=PARAMS),
        Inspect(nonce=5, request_ids=["r", "s"]),
    ]
    engine.step()
    (answer,) = [message for message in link.sent if isinstance(message, Inspected)]
    assert (answer.nonce, [(view.request_id, view.state) for view in answer.views]) == (5, [("r", "waiting")])


def test_who_waits_for_slots_gets_those_of_a_transfer_that_has_ended_at_once():
    engine, executor, link = make_engine()
    source = KVSource(node_id="P", epoch=1, ticket="u")
    for name in ("r", "s"):
        long = EngineRequest(
            request_id=name, prompt_token_ids=[4] * 90, sampling_params=PARAMS, recv_kv_from=source
        )
        link.inbox.append(long)
    engine.step()
    link.inbox.append(EngineRequest(request_id="w", prompt_token_ids=[5] * 50, sampling_params=PARAMS))
    engine.step()
    assert not executor.batches[-1].rows, "180 of 200 slots are taken"
    link.inbox.append(AbortRequest(request_id="r"))
    transport = executor.worker.transport
    transport.pace, kept = 1.0, transport.receipts.pop("s")
    engine.step()
    transport.pace, transport.receipts["s"] = 0.0, kept
    engine.step()
    assert executor.batches[-1].rows
    assert link.waits[-1] == 0.0


def test_a_message_ends_the_wait_of_a_receiving_engine():
    engine, executor, link = make_engine()
    link.inbox.append(RECEIVING)
    engine.step()
    link.inbox.append(EngineRequest(request_id="s", prompt_token_ids=[4, 4], sampling_params=PARAMS))
    engine.step()
    assert executor.batches[-1].rows, "a request beside the transfer is computed at once"
