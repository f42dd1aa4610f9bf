"""How long a transfer says that it took: while KV moved, not while it was computed."""

import socket
import threading
import time

import pytest

from lightllm.transfer import LANES, lane
from tests.transfer.nodes import SOURCE_EPOCH, TARGET_EPOCH, End, Request


@pytest.fixture(params=["shm", "tcp", "here"])
def pair(request, monkeypatch):
    """A sender and a receiver, also of blocks that are announced while they are computed."""
    monkeypatch.setattr(lane, "LANES", {**LANES, "here": "tests.transfer.here:HereLane"})
    lanes = (request.param,)
    ends = End(lanes, epoch=SOURCE_EPOCH, seed=1), End(lanes, epoch=TARGET_EPOCH, seed=2)
    yield ends
    for end in ends:
        end.close()


@pytest.mark.parametrize("cached", [(), (50,)], ids=["one order", "cached KV before it"])
def test_the_step_of_a_prompt_does_not_count(pair, cached):
    source, target = pair
    request, gate = Request(), source.gate()
    target.receive(request.expected())
    *computed, last = request.orders(target.address(), *cached)
    for order in computed:
        source.send(order)
    source.send(last, 42, gate)
    time.sleep(0.4)
    source.open(gate)
    for end in pair:
        assert 0 < end.wait().transfers[0].duration_s < 0.25


def test_what_the_receiver_waits_for_its_own_device_counts_at_both_ends(pair):
    source, target = pair
    request, computed, free = Request(), source.gate(), target.gate()
    (order,) = request.orders(target.address())
    source.send(order, 42, computed)
    time.sleep(0.3)  # the sender has nobody to talk to, and computes
    target.receive(request.expected(), free)
    time.sleep(0.05)
    source.open(computed)
    time.sleep(0.3)
    target.open(free)
    for end in pair:
        assert 0.2 < end.wait().transfers[0].duration_s < 0.55


@pytest.mark.parametrize("ends_s", [0.2, 0.45])
def test_waiting_for_the_receivers_order_does_not_count_however_long_the_step_takes(pair, ends_s):
    source, target = pair
    request, gate = Request(), source.gate()
    (order,) = request.orders(target.address())
    source.send(order, 42, gate)
    threading.Timer(ends_s, source.open, [gate]).start()
    time.sleep(0.35)
    target.receive(request.expected())
    for end in pair:
        assert 0 < end.wait().transfers[0].duration_s < 0.25


class SlowProxy:
    """Passes bytes on to the receiver at 64 kB/s, and all that comes back at once."""

    def __init__(self, address):
        host, port = address.removeprefix("tcp://").split(":")
        self.target = host, int(port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        with self.listener, self.listener.accept()[0] as dialled:
            with socket.create_connection(self.target) as target:
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                back = threading.Thread(target=self._pump, args=(target, dialled, 0.0))
                back.start()
                self._pump(dialled, target, 1 / 64_000)
                target.shutdown(socket.SHUT_RDWR)
                back.join()

    @staticmethod
    def _pump(source, sink, s_per_byte):
        while data := source.recv(512):
            time.sleep(len(data) * s_per_byte)
            sink.sendall(data)


def test_bytes_that_move_slowly_count_at_both_ends():
    """The second order comes while the blocks of the first still move: nobody waits for the engine."""
    source, target = (
        End(("tcp",), epoch=epoch, seed=epoch, block_bytes=65_536) for epoch in (SOURCE_EPOCH, TARGET_EPOCH)
    )
    proxy, request = SlowProxy(target.address()), Request()
    target.receive(request.expected())
    first, last = request.orders(proxy.address, 42)
    began_s = time.monotonic()
    source.send(first)
    time.sleep(0.3)
    source.send(last, 42)
    transfers = source.wait().transfers[0], target.wait().transfers[0]
    in_all_s = time.monotonic() - began_s
    assert in_all_s > 1.1
    assert all(0.9 * in_all_s < told.duration_s <= in_all_s for told in transfers)
    for end in (source, target):
        end.close()
    proxy.thread.join()


def test_the_time_of_a_transfer_is_without_that_of_the_steps_that_it_waits_for():
    source, target = End(epoch=SOURCE_EPOCH, seed=1), End(epoch=TARGET_EPOCH, seed=2)
    request = Request()
    target.receive(request.expected())
    first, last = request.orders(target.address(), 50)
    source.send(first)
    time.sleep(0.3)
    gate = source.gate()
    source.send(last, gate=gate)
    time.sleep(0.3)
    source.open(gate)
    time.sleep(0.3)
    source.complete(request.request_id, 42)
    for end in (source, target):
        (told,) = end.wait().transfers
        assert 0 < told.duration_s < 0.25, "of 0.9 s, in which it moved for some ms"
        end.close()


def test_time_in_which_bytes_are_on_their_way_counts_whatever_else_is_waited_for():
    source, target = End(epoch=SOURCE_EPOCH, seed=1), End(epoch=TARGET_EPOCH, seed=2)
    request = Request()
    gate = target.gate()
    target.receive(request.expected(), gate=gate)  # it is written only behind this
    first, last = request.orders(target.address(), 50)
    source.send(first)
    time.sleep(0.4)  # the two have met by then, so that 0.3 s of it count
    target.open(gate)
    source.send(last, 42)
    for end in (source, target):
        (told,) = end.wait().transfers
        assert 0.3 <= told.duration_s < 1
        end.close()
