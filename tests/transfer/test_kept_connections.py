"""Connections of a KV link serve one transfer after the other, and are never a reason for one to fail."""

import threading
import time

import pytest

from lightllm.transfer import link
from tests.transfer.nodes import Request
from tests.transfer.test_disturbed_links import NUM_FRAMES, NUM_TOKENS, check_right, ends, ship, wait_until

# Of a transfer on a kept connection: all but the greeting.
NUM_LATER_FRAMES = {"there": NUM_FRAMES["there"] - 1, "back": NUM_FRAMES["back"] - 2}


def request(number):
    return Request(NUM_TOKENS, request_id=f"r{number}", ticket=f"ticket-{number:>012}")


def move(source, target, proxy, number):
    """One transfer that comes through."""
    one = request(number)
    ship(source, target, proxy.address, one)
    assert source.wait(len(source.endings.transfers) + 1).sent[-1] == f"r{number}"
    assert target.wait(len(target.endings.transfers) + 1).received[-1].request_id == f"r{number}"
    check_right(source, target, one)


def num_greetings(proxy):
    """How often somebody has dialled: only a first frame says what a link is for."""
    return sum(b"purpose" in frame for frame in proxy.frames["there"])


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_transfers_go_over_one_connection_one_after_the_other(lane):
    with ends(lane) as (source, target, proxy):
        for number in range(5):
            move(source, target, proxy, number)
        wait_until(lambda: len(proxy.frames["back"]) == NUM_FRAMES["back"] + 4 * NUM_LATER_FRAMES["back"])
        assert len(proxy.frames["there"]) == NUM_FRAMES["there"] + 4 * NUM_LATER_FRAMES["there"]
        assert num_greetings(proxy) == 1


def test_transfers_at_the_same_time_have_connections_of_their_own():
    with ends("tcp") as (source, target, proxy):
        for number in range(3):
            target.receive(request(number).expected())
            first, _ = request(number).orders(proxy.address, 5)
            source.send(first)
        wait_until(lambda: num_greetings(proxy) == 3)
        for number in range(3):
            source.send(request(number).orders(proxy.address, 5)[1], 42)
        assert len(source.wait(3).sent) == len(target.wait(3).received) == 3
        move(source, target, proxy, 3)
        assert num_greetings(proxy) == 3


def test_a_connection_whose_transfer_has_failed_is_not_used_again():
    with ends("tcp") as (source, target, proxy):
        target.receive(request(0).expected(epoch=5))
        source.send(request(0).orders(proxy.address)[0], 42)
        assert source.fault() == "old_epoch"
        target.cancel("r0")
        target.wait()
        move(source, target, proxy, 1)
        assert num_greetings(proxy) == 2


def test_one_that_waits_for_the_receivers_slots_can_be_given_up():
    with ends("tcp") as (source, target, proxy):
        move(source, target, proxy, 0)
        num_frames = len(proxy.frames["there"])
        source.send(request(1).orders(proxy.address)[0], 42)
        wait_until(lambda: len(proxy.frames["there"]) > num_frames)  # it has asked
        source.cancel("r1")
        assert source.fault(2) == "cancelled"
        move(source, target, proxy, 2)
        assert num_greetings(proxy) == 2


@pytest.mark.parametrize("way", ["there", "back"])
def test_one_that_breaks_as_it_is_used_again_is_replaced(way):
    """The peer hangs up when the next transfer is asked for, or when it would have been answered."""
    with ends("tcp") as (source, target, proxy):
        move(source, target, proxy, 0)
        proxy.harm = way, NUM_FRAMES[way], "cut"
        one = request(1)
        if way == "there":
            move(source, target, proxy, 1)
            assert num_greetings(proxy) == 2
        else:  # the receiver has given its word to the connection that broke: the engine tries again
            ship(source, target, proxy.address, one)
            assert source.wait(2).failed
            assert target.wait(2).failed
        proxy.harm = None
        move(source, target, proxy, 2)


def test_one_that_was_closed_meanwhile_is_replaced(monkeypatch):
    monkeypatch.setattr(link, "IDLE_LIMIT_S", 0.1)
    with ends("tcp") as (source, target, proxy):
        move(source, target, proxy, 0)
        wait_until(lambda: not target.link._connections)
        time.sleep(0.05)  # the proxy hands it on
        move(source, target, proxy, 1)
        assert num_greetings(proxy) == 2


def test_a_late_cancel_does_not_touch_the_next_transfer():
    with ends("tcp") as (source, target, proxy):
        move(source, target, proxy, 0)
        target.receive(request(1).expected())
        first, last = request(1).orders(proxy.address, 5)
        source.send(first)
        wait_until(lambda: len(proxy.frames["there"]) >= NUM_FRAMES["there"] + 2)
        for end in (source, target):
            end.cancel("r0")
        source.send(last, 42)
        assert source.wait(2).sent[-1] == "r1"
        assert target.wait(2).received[-1].request_id == "r1"
        assert num_greetings(proxy) == 1


def test_a_peer_that_was_started_anew_is_dialled_anew():
    with ends("tcp") as (source, target, proxy), ends("tcp") as (_, again, other):
        move(source, target, proxy, 0)
        for channel in list(target.link._connections):
            channel.interrupt()  # as its end does
        proxy._target = other._target
        move(source, again, proxy, 1)
        assert num_greetings(proxy) == 2


def test_links_with_idle_connections_stop_at_once():
    with ends("tcp") as (source, target, proxy):
        move(source, target, proxy, 0)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 1.0
    assert not [one for one in threading.enumerate() if one.name in ("kv-receive", "kv-send")]
