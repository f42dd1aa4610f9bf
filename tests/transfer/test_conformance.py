"""What every lane must do, over the table of lanes: a lane that is listed is tested."""

import functools
import importlib.util
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
import torch

from lightllm.device.base import PastMoment
from lightllm.transfer import LANES
from lightllm.transfer.base import NullTransport
from tests.transfer.nodes import BLOCK_BYTES, LAYOUT, SOURCE_EPOCH, TARGET_EPOCH, TOKEN, End, Request
from tests.transfer.remote import Nodes

NEED_GPU = ("p2p",)
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="for Triton's interpreter"
)
PLACES = {"host": (), "interpreted": INTERPRETED, "gpu": pytest.mark.gpu}


@pytest.fixture(
    params=[
        pytest.param((lane, place), id=f"{lane}-{place}", marks=marks)
        for lane in LANES
        for place, marks in PLACES.items()
        if place == "gpu" or lane not in NEED_GPU
    ]
)
def way(request):
    """A lane, and where the pools of both nodes are."""
    if request.param[0] == "nixl" and importlib.util.find_spec("nixl") is None:
        pytest.skip("nixl is not installed (the extra lightllm[pd])")
    return request.param


@pytest.fixture
def lane(way):
    return way[0]


@pytest.fixture(scope="session")
def other_process():
    """Where a node runs whose GPU memory another one opens: no process can open its own."""
    with Nodes(ctx=multiprocessing.get_context("spawn")) as nodes:
        yield nodes


@pytest.fixture
def make_end(request):
    ends = []

    def make(lanes, epoch, *, is_remote=False, **fields):
        make = request.getfixturevalue("other_process").End if is_remote else End
        ends.append(make(lanes, epoch=epoch, seed=epoch, **fields))
        return ends[-1]

    yield make
    for end in ends:
        end.close()


@pytest.fixture
def make_source(way, make_end):
    lane, place = way
    return functools.partial(make_end, (lane,), SOURCE_EPOCH, is_remote=lane in NEED_GPU, place=place)


@pytest.fixture
def make_target(way, make_end):
    return functools.partial(make_end, (way[0],), TARGET_EPOCH, place=way[1])


@pytest.fixture
def pair(make_source, make_target):
    return make_source(), make_target()


def ship(source, request, target, *cuts, **fields):
    *orders, last = request.orders(target.address(), *cuts, **fields)
    for order in orders:
        source.send(order)
    source.send(last, 42)


def check_arrival(source, target, request):
    (arrival,) = target.wait().received
    assert (arrival.request_id, arrival.first_token_id) == (request.request_id, 42)
    assert source.wait().sent == [request.request_id]
    sent = source.kv(request.source_slots[request.start :])
    assert np.array_equal(target.kv(request.target_slots), sent)
    figures = [end.wait().transfers[0] for end in (source, target)]
    assert [(told.direction, told.fault) for told in figures] == [("sent", ""), ("received", "")]
    assert figures[0].transport == figures[1].transport in LANES
    assert [told.num_bytes for told in figures] == [sent.nbytes] * 2
    assert all(0 < told.duration_s < 10 for told in figures)


# ------------------------------------------------------------ what arrives


@pytest.mark.parametrize(("num_tokens", "start"), [(1, 0), (2, 1), (100, 0), (150, 149), (150, 7)])
@pytest.mark.parametrize("cuts", [(), (60, 61, 90)])
def test_all_bytes_arrive_in_their_slots_and_no_others_change(pair, num_tokens, start, cuts):
    source, target = pair
    request = Request(num_tokens, start)
    others = sorted(set(range(200)) - set(request.target_slots))
    before = target.kv(others)
    target.receive(request.expected())
    ship(source, request, target, *(cut for cut in cuts if cut < num_tokens))
    check_arrival(source, target, request)
    assert np.array_equal(target.kv(others), before)


def test_a_sender_may_come_before_its_order_and_may_take_its_time(pair):
    source, target = pair
    request = Request()
    first, last = request.orders(target.address(), 50)
    source.send(first)
    time.sleep(0.2)
    target.receive(request.expected())
    time.sleep(1.3)  # longer than a peer may be silent: it says that it lives
    assert not any(source.poll())
    source.send(last, 42)
    check_arrival(source, target, request)


def test_many_at_once_do_not_mix(pair):
    source, target = pair
    requests = [Request(20 + i, 0, f"r{i}", f"ticket-{i:010}") for i in range(6)]
    for i, request in enumerate(requests):  # slots of their own
        request.target_slots = list(range(1 + 30 * i, 1 + 30 * i + 20 + i))
        target.receive(request.expected())
    for request in requests:
        ship(source, request, target, 10)
    source.wait(len(requests))
    assert not target.wait(len(requests)).failed
    for request in requests:
        assert np.array_equal(target.kv(request.target_slots), source.kv(request.source_slots))


# ------------------------------------------------------------ devices that run behind the calls


def test_kv_leaves_only_once_its_step_is_computed(pair):
    source, target = pair
    request, gate = Request(), source.gate()
    target.receive(request.expected())
    first, last = request.orders(target.address(), 50)
    source.send(first)
    source.send(last, 42, gate)
    time.sleep(1.5)  # longer than a peer may be silent
    assert not any(target.poll())
    source.change(request.source_slots[50:])
    source.open(gate)
    check_arrival(source, target, request)


def test_slots_are_written_only_once_earlier_steps_are_done_with_them(pair):
    source, target = pair
    request, gate = Request(), target.gate()
    before = target.kv(request.target_slots)
    target.receive(request.expected(), gate)
    ship(source, request, target)
    time.sleep(0.1)
    assert np.array_equal(target.kv(request.target_slots), before)
    assert not any(target.poll())
    target.open(gate)
    check_arrival(source, target, request)


def test_all_kv_leaves_before_the_first_token_is_known(pair):
    source, target = pair
    request = Request()
    target.receive(request.expected())
    (order,) = request.orders(target.address())
    source.send(order)
    until_s = time.monotonic() + 5
    while not np.array_equal(target.kv(request.target_slots), source.kv(request.source_slots)):
        assert time.monotonic() < until_s
        time.sleep(0.01)
    time.sleep(1.3)  # longer than a peer may be silent
    assert not any(target.poll())
    source.complete("r", 42)
    check_arrival(source, target, request)


@pytest.mark.parametrize("name", ["source", "target"])
def test_a_cancelled_transfer_ends_while_the_device_is_busy(pair, name):
    source, target = pair
    busy = {"source": source, "target": target}[name]
    request, gate = Request(), busy.gate()
    target.receive(request.expected(), gate if busy is target else None)
    (order,) = request.orders(target.address())
    source.send(order, 42, gate if busy is source else None)
    time.sleep(0.1)
    busy.cancel("r")
    assert busy.wait(limit_s=0.5).failed[0].reason == "cancelled"
    before = target.kv(list(range(200)))
    busy.open(gate)
    source.wait()
    target.wait()
    assert np.array_equal(target.kv(list(range(200))), before)


# ------------------------------------------------------------ pools that differ


def test_pools_of_different_sizes(make_source, make_target):
    source, target = make_source(num_slots=260), make_target()
    request = Request()
    request.source_slots = [slot + 60 for slot in request.source_slots]
    target.receive(request.expected())
    ship(source, request, target)
    check_arrival(source, target, request)


@pytest.mark.parametrize("places", [("host", "interpreted"), ("interpreted", "host")])
@INTERPRETED
def test_blocks_look_the_same_wherever_they_are_packed(make_end, places):
    source = make_end(("tcp",), SOURCE_EPOCH, place=places[0], block_bytes=BLOCK_BYTES)
    target = make_end(("tcp",), TARGET_EPOCH, place=places[1], block_bytes=BLOCK_BYTES)
    request = Request()
    target.receive(request.expected())
    ship(source, request, target)
    check_arrival(source, target, request)


# ------------------------------------------------------------ ends


def test_after_a_cancelled_receipt_no_byte_lands(pair):
    source, target = pair
    request = Request()
    target.receive(request.expected())
    first, last = request.orders(target.address(), 50)
    source.send(first)
    time.sleep(0.1)
    target.cancel("r")
    assert target.wait().failed[0].reason == "cancelled"
    assert target.fault() == "cancelled"
    before = target.kv(list(range(200)))
    source.send(last, 42)
    assert source.fault() in ("peer_lost", "not_accepted")  # by what it hears first
    assert np.array_equal(target.kv(list(range(200))), before)
    target.cancel("r")
    assert not any(target.poll())


def test_a_cancelled_shipment_fails_at_once_at_both_ends(pair):
    source, target = pair
    request = Request()
    target.receive(request.expected())
    before = target.kv(request.target_slots)
    source.send(request.orders(target.address(), 50)[0])
    while np.array_equal(target.kv(request.target_slots)[:, :, 49], before[:, :, 49]):
        time.sleep(0.01)
    time.sleep(0.1)
    source.cancel("r")
    assert source.wait(limit_s=0.5).failed[0].reason == "cancelled"
    assert "closed the connection" in target.reason()
    assert (source.fault(), target.fault()) == ("cancelled", "peer_lost")
    num_bytes = source.kv(range(50)).nbytes
    assert [end.wait().transfers[0].num_bytes for end in (source, target)] == [num_bytes] * 2


def test_a_later_order_of_a_failed_shipment_means_nothing(pair):
    source, target = pair
    first, last = Request().orders(target.address(), 50)
    source.send(first)  # nobody expects it
    assert "no transfer is expected" in source.reason()
    source.send(last, 42)
    time.sleep(0.05)
    assert not any(source.poll())


@pytest.fixture
def half_sent(way, make_target):
    """A receiver that has got half of a request from a process, and that process."""
    target = make_target()
    request = Request()
    target.receive(request.expected())
    command = [sys.executable, "-m", "tests.transfer.nodes", *way, target.address(), str(TARGET_EPOCH)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    before = target.kv(request.target_slots)
    until_s = time.monotonic() + 30
    while np.array_equal(target.kv(request.target_slots[49:50]), before[:, :, 49:50]):
        assert time.monotonic() < until_s
        time.sleep(0.01)
    yield target, process, request
    process.kill()
    process.communicate()


def test_a_killed_sender_is_noticed_at_once(half_sent):
    target, process, _ = half_sent
    process.send_signal(signal.SIGKILL)
    assert "the connection" in target.wait(limit_s=0.5).failed[0].reason  # closed, broken or reset
    assert target.fault() == "peer_lost"


def test_a_frozen_sender_is_given_up_and_cannot_write_when_it_wakes(half_sent):
    target, process, request = half_sent
    process.send_signal(signal.SIGSTOP)
    assert "silent for too long" in target.wait(limit_s=2.0).failed[0].reason
    assert target.fault() == "peer_silent"
    before = target.kv(request.target_slots)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    assert np.array_equal(target.kv(request.target_slots), before)


def test_a_silent_receiver_is_given_up(make_source):
    source = make_source()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ship(source, Request(), source, epoch=1)  # against its own link: refused
        assert "not 1" in source.reason()
        request = Request(request_id="other")
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        source.send(request.orders(address)[0], 42)
        assert "silent for too long" in source.wait(2).failed[1].reason
        assert source.fault(2) == "peer_silent"


# ------------------------------------------------------------ what does not belong together


def test_a_wrong_ticket_is_refused_and_the_right_one_still_works(pair):
    source, target = pair
    target.receive(Request().expected())
    ship(source, Request(ticket="another-0123456789"), target)
    assert "no transfer is expected under this ticket" in source.reason()
    assert source.fault() == "bad_ticket"
    ship(source, Request(), target)
    assert target.wait().received
    ship(source, Request(), target)  # used
    assert len(source.wait(3).failed) == 2


def test_messages_of_a_former_life_are_refused(pair):
    source, target = pair
    target.receive(Request().expected(epoch=SOURCE_EPOCH + 1))
    ship(source, Request(), target)
    assert "not 71" in source.reason()
    ship(source, Request(), target, epoch=TARGET_EPOCH + 1)
    assert "the node was restarted" in source.wait(2).failed[1].reason
    assert source.fault(2) == "old_epoch"
    assert not any(target.poll())


def test_layouts_that_differ_are_shown_at_both_ends(make_source, make_target):
    source = make_source(layout=msgspec.structs.replace(LAYOUT, kv_dtype="bfloat16"))
    target = make_target()
    target.receive(Request().expected())
    ship(source, Request(), target)
    shown = "kv_dtype: here 'float32', there 'bfloat16'"
    assert shown in source.reason()
    assert shown in target.reason()
    assert (source.fault(), target.fault()) == ("bad_layout", "bad_layout")


def test_other_tokens_or_fewer_are_not_accepted(pair):
    source, target = pair
    request = Request()
    target.receive(request.expected(token_ids=[*request.token_ids[:-1], 98]))
    ship(source, request, target)
    assert "does not match: digest" in target.reason()
    assert "does not match: digest" in source.reason()
    assert (source.fault(), target.fault()) == ("not_accepted", "not_accepted")


def test_without_the_token_nothing_is_sent(make_source, make_target):
    source, target = make_source(token=TOKEN[::-1]), make_target()
    target.receive(Request().expected())
    ship(source, Request(), target)
    assert "cluster tokens differ" in source.reason()
    assert source.fault() == "bad_token"
    assert not any(target.poll())


def test_two_that_have_no_lane_in_common(make_end):
    source, target = make_end(("tcp",), SOURCE_EPOCH), make_end(("shm",), TARGET_EPOCH)
    target.receive(Request().expected())
    ship(source, Request(), target)
    assert "no common --kv_transport: tcp: not open here" in source.reason()
    assert (source.fault(), target.fault()) == ("no_lane", "no_lane")
    assert source.endings.transfers[0].transport == "none"


def test_the_first_common_lane_is_taken_and_the_log_says_so_once(make_end, caplog):
    caplog.set_level("INFO")
    source, target = make_end(("shm", "tcp"), SOURCE_EPOCH), make_end(("tcp",), TARGET_EPOCH)
    for i in range(2):
        request = Request(request_id=f"r{i}", ticket=f"ticket-{i:010}")
        target.receive(request.expected())
        ship(source, request, target)
        target.wait(i + 1)
        source.wait(i + 1)
    assert [arrival.request_id for arrival in target.endings.received] == ["r0", "r1"]
    assert caplog.text.count("KV of node P comes by tcp; not shm: not open here") == 1


# ------------------------------------------------------------ strangers


@pytest.mark.parametrize(
    "data",
    [
        os.urandom(5000),
        struct.pack("<I", 2**31),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<I", 3) + b"\x80\x04N",
        b"",
    ],
    ids=["random", "oversize", "tls", "http", "pickle", "nothing"],
)
def test_strangers_are_turned_away_and_harm_nobody(make_end, data):
    source, target = make_end(("tcp",), SOURCE_EPOCH), make_end(("tcp",), TARGET_EPOCH)
    host, port = target.address().removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.settimeout(5)
        try:
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
        except TimeoutError:
            raise
        except OSError:
            pass  # the link hung up in the middle of it
    target.receive(Request().expected())
    ship(source, Request(), target)
    check_arrival(source, target, Request())


def test_a_thousand_connections_that_reset_leave_nothing(make_end):
    source, target = make_end(("tcp",), SOURCE_EPOCH), make_end(("tcp",), TARGET_EPOCH)
    host, port = target.address().removeprefix("tcp://").split(":")
    for _ in range(1000):
        stranger = socket.create_connection((host, int(port)))
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.close()
    target.receive(Request().expected())
    ship(source, Request(), target)
    check_arrival(source, target, Request())
    until_s = time.monotonic() + 5
    while len(target.link._connections) > 1:  # the one that came through is kept
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_no_file_is_left_open(pair):
    source, target = pair
    before = None
    for i in range(4):
        request = Request(50, 0, f"r{i}", f"ticket-{i:010}")
        target.receive(request.expected())
        ship(source, request, target, 20)
        target.wait(i + 1)
        source.wait(i + 1)
        time.sleep(0.1)
        before = before or len(os.listdir("/proc/self/fd"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_node_without_a_link_fails_both_ways():
    transport, request = NullTransport(), Request()
    transport.receive(request.expected(), PastMoment())
    for order in request.orders("tcp://127.0.0.1:1", 50):
        transport.send(order, PastMoment())
    transport.complete("r", 1)
    transport.cancel("r")
    endings = transport.poll()
    assert [failure.reason for failure in endings.failed] == [NullTransport.REASON] * 2
    assert [(t.direction, t.fault) for t in endings.transfers] == [
        ("received", "no_link"),
        ("sent", "no_link"),
    ]
    assert not any(transport.poll())
