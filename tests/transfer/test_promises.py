"""A last word before the last block is read: the sender promises to keep its slots, and is held to it."""

import contextlib
import threading
import time

import msgspec
import numpy as np
import pytest

from lightllm.cluster_link import HEAD_BYTES
from lightllm.errors import KVTransferError
from lightllm.messages import KVFailure
from lightllm.transfer import LANES, frames, lane
from lightllm.transfer.base import Hold, Ledger
from lightllm.transfer.frames import Accepted, Ack, Late, Rejected
from lightllm.transfer.plan import digest
from tests.transfer import here
from tests.transfer.frame_proxy import LENGTH
from tests.transfer.nodes import LAYOUT, SOURCE_EPOCH, TARGET_EPOCH, Request
from tests.transfer.test_announced_blocks import COMPLETE, block, give_up, opened, said
from tests.transfer.test_disturbed_links import LIMITS, check_right, ends, wait_until

PATIENT = LIMITS._replace(silence_s=5.0, alive_s=0.5, kept_s=4.0)
BRIEF = PATIENT._replace(kept_s=0.15)


@pytest.fixture(autouse=True)
def has_lane(monkeypatch):
    monkeypatch.setattr(lane, "LANES", {**LANES, "here": "tests.transfer.here:HereLane"})


def last_words(proxy):
    return [body for body in said(proxy) if body["type"] == "Complete"]


def answers(proxy):
    """What the receiver has said behind its greeting, by name."""
    units = proxy.frames["back"][2:]
    return [msgspec.msgpack.decode(unit[LENGTH.size + HEAD_BYTES :])["type"] for unit in units]


def promised(source, target, proxy, request):
    """Ship all, to a receiver that does not read yet, up to the sender's promise; what lets it read."""
    free = target.gate()
    target.receive(request.expected(), free)
    (order,) = request.orders(proxy.address)
    source.send(order, 42)
    wait_until(lambda: last_words(proxy))
    time.sleep(0.1)  # it is on its way
    return free


@contextlib.contextmanager
def cancelling(source):
    """Meanwhile the sender is asked to give up, by a thread that may have to wait."""
    thread = threading.Thread(target=source.cancel, args=("r",))
    thread.start()
    yield thread
    thread.join(5)
    assert not thread.is_alive()


def test_the_last_word_needs_no_acknowledgement_before_it():
    with ends("here", PATIENT) as (source, target, proxy):
        request = Request(5)
        free = promised(source, target, proxy, request)
        assert "Ack" not in answers(proxy)
        target.open(free)
        assert target.wait().received
        assert source.wait().sent
        check_right(source, target, request)
        assert answers(proxy) == ["Choice", "Accepted"]
        (complete,) = last_words(proxy)
        assert 3.0 < complete["kept_until_s"] - time.monotonic() <= 4.0


def test_a_cancellation_waits_until_the_peer_has_read():
    with ends("here", PATIENT) as (source, target, proxy):
        request = Request(5)
        free = promised(source, target, proxy, request)
        with cancelling(source) as thread:
            thread.join(0.2)
            assert thread.is_alive()
            assert not source.poll_once()
            target.open(free)
        assert target.wait().received
        assert source.wait().sent
        check_right(source, target, request)


def test_a_transfer_that_both_give_up_ends_with_the_promise():
    with ends("here", PATIENT._replace(kept_s=0.5)) as (source, target, proxy):
        free = promised(source, target, proxy, Request(5))
        began_s = time.monotonic()
        with cancelling(source):
            target.cancel("r")
        assert target.wait().failed
        assert source.wait().failed
        assert time.monotonic() - began_s < 1.0
        target.open(free)


def test_a_peer_that_was_late_is_told_again():
    with ends("here", BRIEF) as (source, target, proxy):
        request = Request(5)
        free = promised(source, target, proxy, request)
        time.sleep(0.2)
        target.open(free)
        assert target.wait().received
        assert source.wait().sent
        check_right(source, target, request)
        assert answers(proxy) == ["Choice", "Late", "Accepted"]
        first, second = last_words(proxy)
        assert first["kept_until_s"] > 0 == second.get("kept_until_s", 0)


def test_what_was_given_up_behind_the_promise_is_not_told_again():
    with ends("here", BRIEF) as (source, target, proxy):
        request = Request(5)
        free = promised(source, target, proxy, request)
        began_s = time.monotonic()
        source.cancel("r")
        assert source.wait().failed
        assert time.monotonic() - began_s < 1.0
        source.change(request.source_slots)
        target.open(free)
        assert target.wait().failed
        assert len(last_words(proxy)) == 1


def test_what_is_given_up_while_the_peer_is_late_is_not_told_again():
    with ends("here", BRIEF) as (source, target, proxy):
        request = Request(5)
        free = promised(source, target, proxy, request)
        give_up(source)
        source.change(request.source_slots)
        target.open(free)
        assert target.wait().failed
        assert "Late" in answers(proxy)
        assert len(last_words(proxy)) == 1


def test_the_time_of_the_copy_counts_for_the_promise(monkeypatch):
    unpack = here._Receiver.unpack

    def slowly(receiver, slots):
        unpack(receiver, slots)
        time.sleep(0.3)

    monkeypatch.setattr(here._Receiver, "unpack", slowly)
    with ends("here", BRIEF) as (source, target, proxy):
        request = Request(5)
        target.receive(request.expected())
        (order,) = request.orders(proxy.address)
        source.send(order, 42)
        assert target.wait().received
        assert source.wait().sent
        check_right(source, target, request)
        assert answers(proxy) == ["Choice", "Late", "Accepted"]


def test_a_broken_connection_does_not_break_the_promise():
    with ends("here", PATIENT._replace(kept_s=0.5)) as (source, target, proxy):
        request = Request(5)
        free = promised(source, target, proxy, request)
        (complete,) = last_words(proxy)
        before = source.kv(request.source_slots)
        proxy.cut()
        time.sleep(0.2)
        assert not source.poll_once()
        target.open(free)
        target.wait()
        assert source.wait().failed
        assert time.monotonic() >= complete["kept_until_s"]
        if target.endings.received:
            assert np.array_equal(target.kv(request.target_slots), before)


def test_a_word_that_comes_too_early_and_promises_nothing_ends_the_transfer():
    with ends("here", PATIENT) as (_, target, _):
        request, free = Request(10), target.gate()
        target.receive(request.expected(), free)
        channel = opened(target, request)
        for frame in (block(0), block(1), COMPLETE):
            channel.send(frame, 3)
        time.sleep(0.1)
        target.open(free)
        assert type(channel.receive(frames.FromReceiver, 3)) is Ack
        assert type(channel.receive(frames.FromReceiver, 3)) is Rejected
        assert "Complete out of turn" in target.reason()
        channel.close()


def test_a_promise_that_ended_before_the_copy_counts_for_nothing_whoever_makes_it():
    with ends("here", PATIENT) as (_, target, _):
        request = Request(10)
        target.receive(request.expected())
        channel = opened(target, request)
        for number in range(2):
            channel.send(block(number), 3)
            assert type(channel.receive(frames.FromReceiver, 3)) is Ack
        complete = msgspec.structs.replace(
            COMPLETE,
            ticket=request.ticket,
            source_epoch=SOURCE_EPOCH,
            target_epoch=TARGET_EPOCH,
            digest=digest(LAYOUT, range(2), request.token_ids, [(0, 5), (5, 5)]),
        )
        channel.send(msgspec.structs.replace(complete, kept_until_s=1e-3), 3)
        assert type(channel.receive(frames.FromReceiver, 3)) is Late
        assert not target.poll_once()
        channel.send(complete, 3)
        assert type(channel.receive(frames.FromReceiver, 3)) is Accepted
        assert target.wait().received
        channel.close()


def ended(hold, *, by_s):
    """How a failure that begins now ends: whether it was the first, and after how many seconds."""
    began_s = time.monotonic()
    is_first = hold.fail("cancelled", "cancelled")
    took_s = time.monotonic() - began_s
    assert took_s < by_s
    return is_first, took_s


def test_all_promises_of_a_transfer_bind():
    hold = Hold("r", Ledger(), "sent")
    hold.num_parts = 2
    for _ in range(2):
        hold.promise(5.0)
    threading.Timer(0.05, hold.keep_no_more).start()
    threading.Timer(0.25, hold.keep_no_more).start()
    is_first, took_s = ended(hold, by_s=2.0)
    assert is_first
    assert took_s > 0.2


class SlowLedger(Ledger):
    """One whose caller loses the processor at the wrong moment."""

    def note(self, ending, transfer):
        time.sleep(0.1)
        super().note(ending, transfer)


@pytest.mark.parametrize("ledger", [Ledger(), SlowLedger()], ids=["at once", "slowly"])
def test_a_success_comes_before_a_cancellation_that_waits_and_is_there_when_that_returns(ledger):
    hold = Hold("r", ledger, "sent")
    hold.promise(5.0)
    threading.Timer(0.1, hold.end_part, args=("r", 0.0)).start()
    is_first, _ = ended(hold, by_s=2.0)
    assert not is_first
    assert ledger.take().sent == ["r"]


def test_nothing_is_promised_of_slots_that_are_given_up():
    hold = Hold("r", Ledger(), "sent")
    assert hold.end(KVFailure(request_id="r", reason="x"), "other")
    with pytest.raises(KVTransferError, match="given up here"):
        hold.promise(1.0)


def test_nothing_is_promised_while_a_failure_waits_for_another_promise():
    hold, kept_s = Hold("r", Ledger(), "sent"), []

    def promise():
        with contextlib.suppress(KVTransferError):
            kept_s.append(hold.promise(5.0))

    hold.num_parts = 2
    hold.promise(0.3)
    threading.Timer(0.1, promise).start()
    is_first, took_s = ended(hold, by_s=2.0)
    assert is_first
    assert took_s > 0.2
    assert not kept_s, "slots are given up before the moment that a part has promised"


def test_many_that_are_given_up_wait_together():
    with ends("here", PATIENT._replace(kept_s=0.6)) as (source, target, proxy):
        frees = []
        for number in range(4):
            request = Request(5, request_id=f"r{number}", ticket=f"ticket-{number}-0123456789")
            frees.append(target.gate())
            target.receive(request.expected(), frees[-1])
            (order,) = request.orders(proxy.address)
            source.send(order, 42)
            hold = source.link._sendings[request.request_id].hold
            wait_until(lambda hold=hold: hold._num_promises == 1)
            time.sleep(0.1)
        began_s = time.monotonic()
        source.cancel("r0", "r1", "r2", "r3")
        assert time.monotonic() - began_s < 1.0
        assert len(source.wait(4).failed) == 4
        for free in frees:
            target.open(free)


def test_a_failure_that_is_to_come_lets_no_promise_be_made():
    ledger = Ledger()
    hold = Hold("r", ledger, "sent")
    hold.will_fail("cancelled", "cancelled")
    with pytest.raises(KVTransferError, match="given up here"):
        hold.promise(1.0)
    assert not hold.is_over
    assert hold.fail("what came of that", "other")
    assert [failure.reason for failure in ledger.take().failed] == ["cancelled"]


def test_of_failures_that_wait_the_first_is_told():
    ledger = Ledger()
    hold = Hold("r", ledger, "sent")
    hold.promise(0.3)
    first = threading.Thread(target=hold.fail, args=("the first", "peer_lost"))
    first.start()
    time.sleep(0.1)
    hold.fail("the second", "other")
    first.join(2)
    endings = ledger.take()
    assert [failure.reason for failure in endings.failed] == ["the first"]
    assert [transfer.fault for transfer in endings.transfers] == ["peer_lost"]
