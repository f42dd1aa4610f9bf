"""A lane that gets one block while another is unpacked: in order, none too early, none left behind."""

import time

import pytest

from lightllm.transfer import LANES, lane
from tests.transfer.frame_proxy import HARMS
from tests.transfer.nodes import NUM_SLOTS, Request
from tests.transfer.test_disturbed_links import check_right, ends, harm, ship, wait_until


@pytest.fixture(autouse=True)
def has_lane(monkeypatch):
    monkeypatch.setattr(lane, "LANES", {**LANES, "two": "tests.transfer.here:TwoAtOnceLane"})


def events(target):
    return target.node.lanes["two"].events


def test_one_is_pulled_while_another_is_unpacked():
    with ends("two") as (source, target, proxy):
        request, free = Request(60), target.gate()
        target.receive(request.expected(), free)
        (order,) = request.orders(proxy.address)
        source.send(order, 42)
        wait_until(lambda: len(proxy.frames["there"]) == 6)  # all that the window admits, behind the greeting
        time.sleep(0.1)  # the last of them is on its way
        target.open(free)
        assert target.wait().received
        assert source.wait().sent
        check_right(source, target, request)
        wait_until(lambda: ("left", 0) in events(target))
        seen = events(target)
        assert [index for what, index in seen if what == "arrive"] == list(range(12))
        assert seen[:3] == [("pull", 0), ("pull", 1), ("arrive", 0)]
        for i in range(10):
            assert seen.index(("arrive", i)) < seen.index(("pull", i + 2))


def test_an_abort_leaves_what_was_pulled():
    with ends("two") as (source, target, proxy):
        request, free = Request(60), target.gate()
        target.receive(request.expected(), free)
        (order,) = request.orders(proxy.address)
        source.send(order, 42)
        wait_until(lambda: ("pull", 0) in events(target))
        before = target.kv(list(range(NUM_SLOTS)))
        target.cancel("r")
        target.open(free)
        assert target.wait().failed
        assert source.wait().failed
        time.sleep(0.05)
        assert (target.kv(list(range(NUM_SLOTS))) == before).all()
        wait_until(lambda: any(what == "left" and count for what, count in events(target)))


@pytest.mark.parametrize("kind", HARMS)
@pytest.mark.parametrize("place", [("there", 2), ("there", 4), ("there", 5), ("back", 3), ("back", 6)])
def test_one_frame_comes_to_harm(kind, place):
    harm("two", kind, *place, ship=ship)
