"""The order of steps and transfers, as the transport sees it: nothing waits for a device that is busy."""

import threading

import msgspec
import pytest
import torch

from lightllm.config import Config
from lightllm.device.base import ApproachedMoment, Moment
from lightllm.device.device import CpuDevice
from lightllm.device.kv_pool import KVPool
from lightllm.errors import ConfigError
from lightllm.messages import (
    EngineInfo,
    KVArrival,
    KVSource,
    KVTarget,
    KVTransferOrder,
    ScheduledBatch,
    StepOutput,
)
from lightllm.transfer.base import Endings, NullTransport
from lightllm.worker.kv_exchange import ExchangingRunner, open_kv_link
from lightllm.worker.model_runner import LaunchedStep, Runner
from tests.transfer.nodes import MODEL

TARGET = KVTarget(node_id="D", epoch=1, address="tcp://127.0.0.1:1", ticket="t")
SOURCE = KVSource(node_id="P", epoch=1, ticket="t")
SEND = KVTransferOrder(request_id="s", start=0, slots=[1, 2], target=TARGET)
LAST = KVTransferOrder(request_id="s", start=2, slots=[3], token_ids=[5, 6, 7], row=4, target=TARGET)
RECEIVE = KVTransferOrder(request_id="r", start=0, slots=[8], token_ids=[9], source=SOURCE)


class Mark(Moment):
    """Remembers the last step that had been called for when it was made."""

    def __init__(self, events):
        self.step = [event for event in events if event.startswith(("step", "start"))][-1]

    def wait(self):
        raise AssertionError("the worker's thread must not wait")

    def is_past(self):
        return False


class BusyDevice(CpuDevice):
    """Marks moments that never come."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def mark(self, is_urgent=False):
        return Mark(self.events)


class Steps(Runner):
    """Queues steps; their results come once `is_done` is set."""

    def __init__(self, events):
        self.events, self.is_done = events, threading.Event()

    def launch(self, batch):
        self.events.append(f"step {batch.step_id}")
        return LaunchedStep(lambda: self._result(batch))

    def _result(self, batch):
        assert self.is_done.wait(0), "asked too early"
        return StepOutput(step_id=batch.step_id, token_ids=[[100 + row] for row in batch.rows])


class Recorder(NullTransport):
    """Notes its orders with what their moment is behind."""

    def __init__(self, events):
        super().__init__()
        self.events, self.endings = events, Endings([], [], [], [])

    def receive(self, order, free):
        self.events.append(f"receive {order.request_id} behind {free.step}")

    def send(self, order, written):
        urgent = written.urgent if isinstance(written, ApproachedMoment) else written
        self.events.append(f"send {order.start} behind {urgent.step}")

    def complete(self, request_id, first_token_id):
        self.events.append(f"complete {request_id} {first_token_id}")

    def cancel(self, *request_ids):
        self.events.append(f"cancel {' '.join(request_ids)}")

    def poll(self):
        return self.endings


@pytest.fixture
def exchanging():
    events = ["start"]
    exchanging = ExchangingRunner(Steps(events), BusyDevice(events))
    exchanging.transport = Recorder(events)
    return exchanging


def batch(step_id, **fields):
    columns = {"rows": [3, 4], "starts": [0, 0], "num_new_tokens": [1, 1], "is_sampling": [True, True]}
    return ScheduledBatch(step_id=step_id, **columns, **fields)


def test_orders_stand_between_the_right_steps_and_the_first_token_follows(exchanging):
    events = exchanging.transport.events
    steps = [
        exchanging.launch(batch(0, kv_sends=[SEND])),
        exchanging.launch(batch(1, kv_sends=[LAST], kv_recvs=[RECEIVE], kv_cancels=["c", "d"])),
        exchanging.launch(batch(2)),
    ]
    assert events[1:] == [
        "step 0",
        "send 0 behind step 0",
        "cancel c d",
        "receive r behind step 0",
        "step 1",
        "send 2 behind step 1",
        "step 2",
    ]
    exchanging.runner.is_done.set()
    assert [step.result().step_id for step in steps] == [0, 1, 2]
    assert events[8:] == ["complete s 104"]


def test_orders_wait_for_kv_that_is_written_before_the_step_ends_no_longer_than_for_that(exchanging):
    events = exchanging.transport.events
    early = Mark(["step 0, its last layer"])
    launch = exchanging.runner.launch

    def launch_early(batch):
        step = launch(batch)
        step.kv_written = early
        return step

    exchanging.runner.launch = launch_early
    exchanging.launch(batch(0, kv_sends=[msgspec.structs.replace(SEND, is_computed=True), LAST]))
    assert events[1:] == ["send 0 behind start", "step 0", "send 2 behind step 0, its last layer"]


def test_what_was_computed_earlier_leaves_before_the_step(exchanging):
    events = exchanging.transport.events
    exchanging.launch(batch(0))
    exchanging.launch(batch(1, kv_sends=[msgspec.structs.replace(SEND, is_computed=True), LAST]))
    assert events[1:] == [
        "step 0",
        "send 0 behind step 0",
        "step 1",
        "send 2 behind step 1",
    ]


def test_endings_come_with_the_first_result_that_is_taken_behind_them(exchanging):
    before, after = exchanging.launch(batch(0)), exchanging.launch(batch(1))
    exchanging.runner.is_done.set()
    assert before.result().kv_received == []
    arrival = KVArrival(request_id="r", first_token_id=1)
    exchanging.transport.endings = Endings([arrival], ["s"], [], [])
    output = after.result()
    assert (output.kv_received, output.kv_sent, output.kv_failed) == ([arrival], ["s"], [])


def test_a_question_is_answered_without_a_step(exchanging):
    exchanging.transport.endings = Endings([], ["s"], [], [])
    question = ScheduledBatch(step_id=7)
    output = exchanging.launch(question).result()
    assert (output.step_id, output.kv_sent) == (7, ["s"])
    assert exchanging.transport.events == ["start"]
    orders = {"freed_rows": [1], "kv_recvs": [RECEIVE], "kv_cancels": ["c"], "is_restart": True}
    for name, value in orders.items():
        assert not msgspec.structs.replace(question, **{name: value}).is_question


def test_endings_are_not_lost_with_the_result_of_a_step_that_failed(exchanging):
    failing = exchanging.launch(batch(0))
    exchanging.transport.endings = Endings([], ["s"], [], [])
    with pytest.raises(AssertionError, match="too early"):
        failing.result()
    exchanging.runner.is_done.set()
    assert exchanging.launch(batch(1)).result().kv_sent == ["s"]


# ------------------------------------------------------------ which lanes


@pytest.fixture
def link_of():
    """Open a link on a CPU with these settings; the runner that has it."""
    opened = []

    def open_one(kv_transport="auto", use_p2p=None):
        config, replace = Config(), msgspec.structs.replace
        config = replace(
            config,
            pd=replace(config.pd, kv_transport=kv_transport),
            security=replace(config.security, cluster_token="0123456789abcdef" * 2),
            environment=replace(config.environment, kv_trans_use_p2p=use_p2p),
        )
        exchanging = ExchangingRunner(Steps([]), CpuDevice())
        exchanging.runner.kv_pool = KVPool(MODEL, 20, torch.float32)
        info = EngineInfo(
            device="cpu",
            dtype="float32",
            kv_total_tokens=19,
            max_req_total_len=10,
            vocab_size=99,
            load_s=0.0,
            attention_backend="",
        )
        info = open_kv_link(exchanging, info, config, MODEL, ("m", "t"), 0, 5)
        opened.append(exchanging.transport)
        return info

    yield open_one
    for link in opened:
        link.close()


def test_the_log_says_by_which_lanes_and_why(link_of, caplog):
    caplog.set_level("INFO")
    info = link_of()
    assert info.kv_address.startswith("tcp://127.0.0.1:")
    assert "no lane p2p: the KV is on a cpu, not on a GPU" in caplog.text
    assert "by shm or tcp (--kv_transport auto)" in caplog.text
    caplog.clear()
    link_of(use_p2p=False)
    assert "p2p: the KV" not in caplog.text
    assert "by shm or tcp (--kv_transport auto, KV_TRANS_USE_P2P=0)" in caplog.text
    link_of("tcp")
    assert "by tcp (--kv_transport tcp)" in caplog.text


def test_a_lane_that_is_asked_for_and_cannot_be_used_is_an_error(link_of):
    with pytest.raises(ConfigError, match="--kv_transport p2p cannot be used here: p2p: the KV is on a cpu"):
        link_of("p2p")
