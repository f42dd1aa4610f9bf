"""How long a transfer says that it took: while KV moved, not while it was computed."""

import time

from tests.transfer.nodes import SOURCE_EPOCH, TARGET_EPOCH, End, Request


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
    time.sleep(0.3)
    target.open(gate)
    source.send(last, 42)
    for end in (source, target):
        (told,) = end.wait().transfers
        assert 0.3 <= told.duration_s < 1
        end.close()
