"""The order of steps and transfers, as the transport sees it: nothing waits for a device that is busy."""

import threading

import pytest

from lightllm.device.base import Moment
from lightllm.device.device import CpuDevice
from lightllm.messages import KVArrival, KVSource, KVTarget, KVTransferOrder, ScheduledBatch, StepOutput
from lightllm.transfer.base import Endings, NullTransport
from lightllm.worker.kv_exchange import ExchangingRunner
from lightllm.worker.model_runner import LaunchedStep, Runner

TARGET = KVTarget(node_id="D", epoch=1, address="tcp://127.0.0.1:1", ticket="t")
SOURCE = KVSource(node_id="P", epoch=1, ticket="t")
SEND = KVTransferOrder(request_id="s", start=0, slots=[1, 2], target=TARGET)
LAST = KVTransferOrder(request_id="s", start=2, slots=[3], token_ids=[5, 6, 7], row=4, target=TARGET)
RECEIVE = KVTransferOrder(request_id="r", start=0, slots=[8], token_ids=[9], source=SOURCE)


class Mark(Moment):
    """Remembers the last step that had been called for when it was made."""

    def __init__(self, events):
        self.step = [event for event in events if event.startswith("step")][-1]

    def wait(self):
        raise AssertionError("the worker's thread must not wait")


class BusyDevice(CpuDevice):
    """Marks moments that never come."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def mark(self):
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
        self.events, self.endings = events, Endings([], [], [])

    def receive(self, order, free):
        self.events.append(f"receive {order.request_id} behind {free.step}")

    def send(self, order, written):
        self.events.append(f"send {order.start} behind {written.step}")

    def complete(self, request_id, first_token_id):
        self.events.append(f"complete {request_id} {first_token_id}")

    def cancel(self, request_id):
        self.events.append(f"cancel {request_id}")

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
        exchanging.launch(batch(1, kv_sends=[LAST], kv_recvs=[RECEIVE], kv_cancels=["c"])),
        exchanging.launch(batch(2)),
    ]
    assert events[1:] == [
        "step 0",
        "send 0 behind step 0",
        "cancel c",
        "receive r behind step 0",
        "step 1",
        "send 2 behind step 1",
        "step 2",
    ]
    exchanging.runner.is_done.set()
    assert [step.result().step_id for step in steps] == [0, 1, 2]
    assert events[8:] == ["complete s 104"]


def test_endings_come_with_the_step_at_whose_launch_they_were_there(exchanging):
    before = exchanging.launch(batch(0))
    arrival = KVArrival(request_id="r", first_token_id=1)
    exchanging.transport.endings = Endings([arrival], ["s"], [])
    after = exchanging.launch(batch(1))
    exchanging.runner.is_done.set()
    assert before.result().kv_received == []
    output = after.result()
    assert (output.kv_received, output.kv_sent, output.kv_failed) == ([arrival], ["s"], [])
