"""Blocks that are announced while their KV is computed: what is read is what was computed, or nothing."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec
import numpy as np
import pytest

from lightllm.cluster_link import HEAD_BYTES, Dialer
from lightllm.transfer import LANES, frames, lane
from lightllm.transfer.channel import Channel
from lightllm.transfer.frames import (
    Accepted,
    Ack,
    Alive,
    Block,
    Choice,
    Complete,
    LaneOffer,
    Opening,
    Ready,
    Rejected,
)
from lightllm.transfer.plan import digest
from tests.transfer.frame_proxy import HARMS, LENGTH
from tests.transfer.nodes import LAYOUT, SOURCE_EPOCH, TARGET_EPOCH, TOKEN, Request
from tests.transfer.test_disturbed_links import LIMITS, NUM_TOKENS, check_right, ends, harm, wait_until

# So seldom does a sender say that it lives that its frames can be counted.
CALM = LIMITS._replace(alive_s=0.5)
# Of the first order a block of five tokens; of the second one block ahead, its Ready, and a block.
NUM_FRAMES = {"there": 7, "back": 7}


@pytest.fixture(autouse=True)
def has_lane(monkeypatch):
    monkeypatch.setattr(lane, "LANES", {**LANES, "here": "tests.transfer.here:HereLane"})


def said(proxy):
    """What the sender has said, behind its greeting."""
    return [msgspec.msgpack.decode(unit[LENGTH.size + HEAD_BYTES :]) for unit in proxy.frames["there"][1:]]


def is_announced(proxy):
    """Whether a block ahead has passed."""
    return any(body.get("is_ahead") for body in said(proxy))


def begin(source, target, address, request):
    """Ship all of it but what the device still computes; its gate."""
    target.receive(request.expected())
    first, last = request.orders(address, 5)
    source.send(first)
    gate = source.gate()
    source.send(last, 42, gate)
    return gate


def ship_ahead(source, target, address, request):
    gate = begin(source, target, address, request)
    time.sleep(0.15)
    source.open(gate)


def test_what_is_computed_behind_the_announcement_arrives():
    with ends("here", CALM) as (source, target, proxy):
        request = Request(NUM_TOKENS)
        before = target.kv(request.target_slots[5:])
        gate = begin(source, target, proxy.address, request)
        wait_until(lambda: is_announced(proxy))
        time.sleep(0.05)
        assert np.array_equal(target.kv(request.target_slots[5:]), before)
        source.change(request.source_slots[5:])
        source.open(gate)
        assert target.wait().received
        assert source.wait().sent
        check_right(source, target, request)
        num_bytes = source.kv(request.source_slots).nbytes
        assert [end.endings.transfers[0].num_bytes for end in (source, target)] == [num_bytes] * 2
        num_alive = sum(body["type"] == "Alive" for body in said(proxy))  # none, unless the machine is slow
        assert len(proxy.frames["there"]) == NUM_FRAMES["there"] + num_alive
        # The last word may be there before the last block is acknowledged, and is its answer then.
        assert NUM_FRAMES["back"] - 1 <= len(proxy.frames["back"]) <= NUM_FRAMES["back"]


@pytest.mark.parametrize("name", ["source", "target"])
def test_one_that_is_given_up_ahead_is_never_read(name):
    with ends("here", CALM) as (source, target, proxy):
        request = Request(NUM_TOKENS)
        gate = begin(source, target, proxy.address, request)
        wait_until(lambda: is_announced(proxy))
        before = target.kv(request.target_slots[5:])
        {"source": source, "target": target}[name].cancel("r")
        source.open(gate)
        assert source.wait().failed
        assert target.wait().failed
        assert np.array_equal(target.kv(request.target_slots[5:]), before)


def give_up(source):
    """End the hold of the sender, with nobody told: the moment before its connection is cut."""
    assert source.link._sendings["r"].hold.fail("given up", "cancelled")


def test_nothing_is_ready_whose_slots_may_be_anothers():
    with ends("here", CALM) as (source, target, proxy):
        request, gate = Request(10), source.gate()
        target.receive(request.expected())
        (order,) = request.orders(proxy.address)
        source.send(order, 42, gate)
        wait_until(lambda: is_announced(proxy))
        give_up(source)
        source.open(gate)
        assert target.wait().failed
        assert not [body for body in said(proxy) if body["type"] == "Ready"]


def test_nothing_is_complete_whose_slots_may_be_anothers():
    with ends("here", CALM) as (source, target, proxy):
        request, free = Request(10), target.gate()
        target.receive(request.expected(), free)
        (order,) = request.orders(proxy.address)
        source.send(order)
        wait_until(lambda: any(body["type"] == "Block" for body in said(proxy)))
        give_up(source)
        source.complete("r", 42)
        target.open(free)  # it reads, and acknowledges
        assert target.wait().failed
        assert not [body for body in said(proxy) if body["type"] == "Complete"]


def test_both_ends_log_what_has_moved_once(caplog):
    caplog.set_level("INFO")
    with ends("here", CALM) as (source, target, proxy):
        request = Request(NUM_TOKENS)
        ship_ahead(source, target, proxy.address, request)
        num_bytes = source.kv(request.source_slots).nbytes
        for word in ("sent", "received"):
            wait_until(lambda word=word: f"KV of r: {word} {num_bytes} bytes by here" in caplog.text)
    assert caplog.text.count("KV of r: ") == 2


@pytest.mark.parametrize("kind", HARMS)
def test_one_frame_comes_to_harm_whichever_it_is(kind):
    places = [(way, index) for way, count in NUM_FRAMES.items() for index in range(count)]
    with ThreadPoolExecutor(len(places)) as pool:
        done = {
            place: pool.submit(partial(harm, "here", kind, *place, ship=ship_ahead, limits=CALM))
            for place in places
        }
    failed = {place: repr(case.exception()) for place, case in done.items() if case.exception() is not None}
    assert not failed


def opened(target, request):
    """A connection of a sender that says what the test wants, up to the receiver's choice."""
    host, port = target.address().removeprefix("tcp://").split(":")
    channel = Channel(socket.create_connection((host, int(port))))
    dialer = Dialer(TOKEN, frames.PURPOSE, "n", SOURCE_EPOCH)
    channel.send_raw(dialer.answer(channel.receive_raw(3)), 3)
    _, channel.seal = dialer.finish(channel.receive_raw(3))
    offer = LaneOffer(name="here", fields=target.offer("here"))
    opening = Opening(ticket=request.ticket, target_epoch=TARGET_EPOCH, rank=0, layout=LAYOUT, lanes=[offer])
    channel.send(opening, 3)
    assert type(channel.receive(frames.FirstFromReceiver, 3)) is Choice
    return channel


def block(index, **fields):
    slots = np.arange(5 * index + 1, 5 * index + 6)
    return Block(index=index, start=5 * index, count=5, fields=slots.tobytes(), **fields)


COMPLETE = Complete(
    ticket="t", source_epoch=1, target_epoch=1, num_tokens=10, first_token_id=1, digest=b"", waited_s=0
)


def test_a_peer_that_lies_of_its_waiting_makes_no_time_negative():
    with ends("here", CALM) as (_, target, _):
        request = Request(10)
        target.receive(request.expected())
        channel = opened(target, request)
        told = [block(0, waited_s=1e9), block(1, is_ahead=True, waited_s=1e9), Ready(waited_s=float("inf"))]
        for frame in told:
            channel.send(frame, 3)
            time.sleep(0.05)  # which is not to count twice
        for _ in range(2):
            assert type(channel.receive(frames.FromReceiver, 3)) is Ack
        agreed = digest(LAYOUT, range(2), request.token_ids, [(0, 5), (5, 5)])
        complete = msgspec.structs.replace(
            COMPLETE,
            ticket=request.ticket,
            source_epoch=SOURCE_EPOCH,
            target_epoch=TARGET_EPOCH,
            digest=agreed,
            waited_s=1e9,
        )
        channel.send(complete, 3)
        assert type(channel.receive(frames.FromReceiver, 3)) is Accepted
        assert 0 <= target.wait().transfers[0].duration_s < 1
        channel.close()


@pytest.mark.parametrize(
    ("frames_sent", "text"),
    [
        ([Ready()], "Ready out of turn"),
        ([block(0), Ready()], "Ready out of turn"),
        ([block(0, is_ahead=True), block(1)], "Block out of turn"),
        ([block(0, is_ahead=True), block(1, is_ahead=True)], "Block out of turn"),
        ([block(0, is_ahead=True), COMPLETE], "Complete out of turn"),
        ([block(0, is_ahead=True), Alive(), Ready(), Ready()], "Ready out of turn"),
    ],
)
def test_frames_in_another_order_end_the_transfer(frames_sent, text):
    with ends("here", CALM) as (_, target, _):
        request = Request(10)
        target.receive(request.expected())
        channel = opened(target, request)
        for frame in frames_sent:
            channel.send(frame, 3)
        assert text in target.reason()
        assert target.fault() == "bad_frame"
        heard = channel.receive(frames.FromReceiver, 3)
        while type(heard) is Ack:
            heard = channel.receive(frames.FromReceiver, 3)
        assert type(heard) is Rejected
        channel.close()
