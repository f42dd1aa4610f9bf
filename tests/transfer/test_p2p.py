"""GPU memory of another process: what an offer must be, and what its owner's death does to the reader."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
import torch

from lightllm.cluster_link import LinkBroken
from lightllm.errors import KVTransferError
from lightllm.transfer.frames import Block
from lightllm.transfer.lane import LaneUnavailable, open_lanes
from lightllm.transfer.plan import HostRows
from tests.transfer.nodes import SOURCE_EPOCH, TARGET_EPOCH, End, Request
from tests.transfer.remote import Nodes

MANY_SLOTS = 1_500_000  # more than 1 GB


def test_a_cpu_says_that_it_has_no_gpu():
    end = End(("tcp",), epoch=1, seed=1)
    with pytest.raises(LaneUnavailable, match="p2p: the KV is on a cpu, not on a GPU"):
        open_lanes(("p2p",), HostRows(end.pool))
    end.close()


@pytest.fixture(scope="module")
def other_process():
    with Nodes(ctx=multiprocessing.get_context("spawn")) as nodes:
        yield nodes


@pytest.fixture
def source(other_process):
    end = other_process.End(("p2p", "tcp"), epoch=SOURCE_EPOCH, seed=1, place="gpu")
    yield end
    end.close()


@pytest.fixture
def target():
    end = End(("p2p", "tcp"), epoch=TARGET_EPOCH, seed=2, place="gpu")
    yield end
    end.close()


def open_receiver(target, offer):
    """The end that a transfer of all heads would have."""
    lane = target.node.lanes["p2p"]
    return lane.open_receiver(offer, lane.cut(lane.rows))


def changed(offer, **fields):
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(offer), **fields})


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"host": "elsewhere"}, "on another host"),
        ({"pid": 2**22 + 1}, "is not to be seen"),
        ({"handle": bytes(64)}, "cannot be read by this GPU"),
        ({"handle": b"short"}, "the sender's offer is none"),
        ({"label": bytes(32)}, "what lies there is not the sender's pool"),
        ({"num_slots": 10**9}, "the sender's pool ends at byte"),
        ({"offset": 2**61}, "the sender's pool ends at byte"),
        ({"num_slots": -1}, "the sender's offer is none"),
        ({"num_heads": 0}, "the sender's offer is none"),
        ({"num_heads": 10**6}, "the sender's pool ends at byte"),
        ({"first_head": 1}, r"has KV heads 1\.\.2, not 0\.\.1"),
        ({"more": 1}, "the sender's offer is none"),
    ],
)
def test_an_offer_that_is_not_true_is_not_taken(source, target, fields, reason):
    offer = source.offer()
    with pytest.raises(LaneUnavailable, match=reason):
        open_receiver(target, changed(offer, **fields))
    open_receiver(target, offer).close()


@pytest.mark.gpu
def test_its_own_memory_is_not_opened(target):
    with pytest.raises(LaneUnavailable, match="this process's own"):
        open_receiver(target, target.offer())


@pytest.mark.gpu
@pytest.mark.parametrize("data", [b"\x80\x04N.", b"", os.urandom(200)], ids=["pickle", "nothing", "random"])
def test_an_offer_is_bytes_of_a_schema(target, data):
    with pytest.raises(LaneUnavailable, match="the sender's offer is none"):
        open_receiver(target, data)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "slots", [[0, 200], [-1, 5], [1], [1, 2, 3]], ids=["behind", "before", "too few", "too many"]
)
def test_slots_that_are_not_the_peers_are_not_read(source, target, slots):
    end = open_receiver(target, source.offer())
    block = Block(index=0, start=0, count=2, fields=np.array(slots, dtype="<i4").tobytes())
    with pytest.raises(LinkBroken):
        end.pull(None, block, 0, 1.0)


@pytest.mark.gpu
def test_where_the_memory_cannot_be_read_the_next_lane_is_taken(target):
    source = End(("p2p", "tcp"), epoch=SOURCE_EPOCH, seed=1, place="gpu")  # in this process
    request = Request()
    target.receive(request.expected())
    (order,) = request.orders(target.address())
    source.send(order, 42)
    assert target.wait().received
    assert source.wait().sent
    assert np.array_equal(source.kv(request.source_slots), target.kv(request.target_slots))
    source.close()


@contextlib.contextmanager
def holder(num_slots):
    """A process with a pool, and what it offers."""
    command = [sys.executable, "-m", "tests.transfer.nodes", "offer", str(num_slots)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process, bytes.fromhex(process.stdout.readline())
    process.kill()
    process.communicate()


def go_on(end, slots, limit_s=10):
    """Read on, as a transfer does that has not heard of it yet."""
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        end.unpack(slots)


@pytest.mark.gpu
def test_the_death_of_a_sender_that_is_read_harms_nobody_and_frees_its_memory(target):
    rows = target.node.rows
    free_bytes = torch.cuda.mem_get_info()[0]
    request, slots = Request(), np.arange(1, 151)
    with holder(MANY_SLOTS) as (process, offer):
        assert free_bytes - torch.cuda.mem_get_info()[0] > 10**9
        end = open_receiver(target, offer)
        fields = np.arange(MANY_SLOTS - 150, MANY_SLOTS, dtype="<i4").tobytes()
        end.pull(None, Block(index=0, start=0, count=150, fields=fields), 150 * rows.token_bytes, 1.0)
        end.prepare(slots)
        for _ in range(20):
            end.unpack(slots)
        process.kill()
        with pytest.raises(KVTransferError, match="the sender's process has ended"):
            go_on(end, slots)
    until_s = time.monotonic() + 10
    while free_bytes - torch.cuda.mem_get_info()[0] > 10**8:
        assert time.monotonic() < until_s, "the memory of the dead process stays taken"
        time.sleep(0.05)
    target.change(request.target_slots)  # the GPU still works for this process
    with pytest.raises(LaneUnavailable, match="is not to be seen"):
        open_receiver(target, offer)
