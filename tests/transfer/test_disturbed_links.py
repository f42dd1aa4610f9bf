"""Each frame of a KV transfer is dropped, doubled, swapped, delayed, changed or cut off: never wrong KV."""

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lightllm.transfer.base import Limits
from tests.transfer.frame_proxy import HARMS, FrameProxy
from tests.transfer.nodes import NUM_SLOTS, SOURCE_EPOCH, TARGET_EPOCH, End, Request

LIMITS = Limits(handshake_s=1.0, silence_s=0.7, alive_s=0.1, ticket_s=0.2)
# Three blocks of five tokens: hello, opening, three blocks, complete; challenge, welcome, choice, three acks,
# accepted.
NUM_TOKENS = 14
NUM_FRAMES = {"there": 6, "back": 7}
PLACES = [(way, index) for way, count in NUM_FRAMES.items() for index in range(count)]
LANES = ("shm", "tcp")


@contextlib.contextmanager
def ends(lane, limits=LIMITS):
    """A sender, a receiver, and what stands between them."""
    source = End((lane,), epoch=SOURCE_EPOCH, seed=1, limits=limits)
    target = End((lane,), epoch=TARGET_EPOCH, seed=2, limits=limits)
    token_bytes = source.node.lanes[lane].rows.token_bytes if lane == "tcp" else 0
    proxy = FrameProxy(target.address(), token_bytes)
    yield source, target, proxy
    for end in (source, target, proxy):
        end.close()


def ship(source, target, address, request):
    target.receive(request.expected())
    first, last = request.orders(address, 5)
    source.send(first)
    source.send(last, 42)


def wait_until(condition, limit_s=3.0):
    until_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def check_right(source, target, request):
    assert np.array_equal(target.kv(request.target_slots), source.kv(request.source_slots))


@pytest.mark.parametrize("lane", LANES)
def test_without_harm_the_frames_are_counted(lane):
    with ends(lane) as (source, target, proxy):
        request = Request(NUM_TOKENS)
        ship(source, target, proxy.address, request)
        assert target.wait().received
        assert source.wait().sent
        check_right(source, target, request)
        assert {way: len(frames) for way, frames in proxy.frames.items()} == NUM_FRAMES


@pytest.mark.parametrize("kind", HARMS)
@pytest.mark.parametrize("lane", LANES)
def test_one_frame_comes_to_harm_whichever_it_is(lane, kind):
    with ThreadPoolExecutor(len(PLACES)) as pool:
        done = {place: pool.submit(harm, lane, kind, *place) for place in PLACES}
    failed = {place: repr(case.exception()) for place, case in done.items() if case.exception() is not None}
    assert not failed


def harm(lane, kind, way, index, ship=ship, limits=LIMITS):
    """One transfer with one harm, and one behind it."""
    with ends(lane, limits) as (source, target, proxy):
        proxy.harm = way, index, kind
        request = Request(NUM_TOKENS)
        ship(source, target, proxy.address, request)
        source.wait(limit_s=4)
        time.sleep(0.1)
        if not target.poll_once() and not source.endings.sent:
            target.cancel("r")  # nobody came to it, as far as it can tell: its lease would end it
        target.wait(limit_s=4)
        assert len(source.endings.transfers) == len(target.endings.transfers) == 1
        assert source.endings.sent or kind != "late"
        assert target.endings.received or not source.endings.sent, "the sender frees what nobody has"
        if target.endings.received:
            check_right(source, target, request)
        # Whatever is still on its way, nobody writes into slots any more.
        after = target.kv(list(range(NUM_SLOTS)))
        time.sleep(0.1)
        assert np.array_equal(target.kv(list(range(NUM_SLOTS))), after)
        proxy.harm = None
        again = Request(NUM_TOKENS, request_id="again", ticket="another-0123456789")
        ship(source, target, proxy.address, again)
        assert source.wait(2).sent[-1:] == ["again"]
        assert target.wait(2).received[-1].request_id == "again"
        check_right(source, target, again)


@pytest.mark.parametrize("lane", LANES)
def test_a_recorded_transfer_cannot_be_played_again(lane):
    """COMPLETE and all before it, from an earlier transfer: the new challenge makes them worthless."""
    with ends(lane) as (source, target, proxy):
        request = Request(NUM_TOKENS)
        ship(source, target, proxy.address, request)
        assert source.wait().sent
        recorded = b"".join(proxy.frames["there"])
        assert target.wait().received
        target.receive(Request(NUM_TOKENS).expected())  # the same ticket, once more
        target.change(request.target_slots)
        before = target.kv(list(range(NUM_SLOTS)))
        host, port = target.address().removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port))) as replay:
            replay.settimeout(3)
            replay.sendall(recorded)
            try:
                while replay.recv(4096):
                    pass
            except ConnectionError:
                pass  # it hung up on what came behind the hello
        assert np.array_equal(target.kv(list(range(NUM_SLOTS))), before)
        assert not any(target.poll())
        target.cancel("r")
