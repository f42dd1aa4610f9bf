"""KV between nodes of different numbers of ranks: each head to every rank that needs it, and to no other."""

import importlib.util
import itertools
import multiprocessing
import threading
import time

import msgspec
import numpy as np
import pytest

from lightllm.distributed.shares import kv_head_ranges
from lightllm.errors import ConfigError
from lightllm.messages import KVSource
from lightllm.transfer import lane
from lightllm.transfer.plan import parts
from tests.transfer.nodes import LAYOUT, LIMITS, SOURCE_EPOCH, TARGET_EPOCH, End, Request, model_of
from tests.transfer.remote import Nodes

HAS_NIXL = importlib.util.find_spec("nixl") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None


MANY, FEW = model_of(12, 6), model_of(8, 2)  # with FEW heads several ranks hold the same one


# ------------------------------------------------------------ who sends what to whom


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6, 8])
def test_every_rank_gets_each_of_its_heads_once(num_kv_heads):
    model = model_of(4 * num_kv_heads, num_kv_heads)
    for source_size, target_size in itertools.product(range(1, 13), repeat=2):
        try:
            sources, targets = kv_head_ranges(model, source_size), kv_head_ranges(model, target_size)
        except ConfigError:
            assert max(source_size, target_size) > model.num_attention_heads
            continue
        found = parts(sources, targets)
        for rank, heads in enumerate(targets):
            assert [h for part in found if part.target_rank == rank for h in part.heads] == list(heads)
        for part in found:
            own = sources[part.source_rank]
            assert own.start <= part.heads.start < part.heads.stop <= own.stop
        pairs = [(part.source_rank, part.target_rank) for part in found]
        assert len(set(pairs)) == len(pairs)
        if source_size == target_size:
            assert pairs == [(rank, rank) for rank in range(source_size)]


def test_several_holders_of_a_head_share_the_work():
    sources, targets = kv_head_ranges(FEW, 4), kv_head_ranges(FEW, 8)
    assert [part.source_rank for part in parts(sources, targets)] == [0, 1, 0, 1, 2, 3, 2, 3]


# ------------------------------------------------------------ bytes


class Group:
    """One node of several ranks. What it is told goes to all of them."""

    def __init__(self, make, lanes, model, size, *, epoch, seed, **fields):
        layout = msgspec.structs.replace(LAYOUT, num_kv_heads=model.num_key_value_heads)
        fields |= {"model": model, "layout": layout, "size": size, "epoch": epoch, "seed": seed}
        self.ends = [make(lanes, rank=rank, **fields) for rank in range(size)]
        self.heads = kv_head_ranges(model, size)

    def address(self):
        return ",".join(end.address() for end in self.ends)

    def send(self, orders, first_token_id=42):
        for end in self.ends:
            for order in orders[:-1]:
                end.send(order)
            end.send(orders[-1], first_token_id)

    def receive(self, order):
        for end in self.ends:
            end.receive(order)

    def endings(self, limit_s=5.0):
        """Of one transfer, of each rank."""
        return [end.wait(limit_s=limit_s) for end in self.ends]

    def kv(self, slots):
        """All heads, put together; of ranks that hold the same one, all must have the same numbers."""
        found = {}
        for heads, end in zip(self.heads, self.ends, strict=True):
            numbers = end.kv(slots)
            for i, head in enumerate(heads):
                assert np.array_equal(found.setdefault(head, numbers[:, :, :, i]), numbers[:, :, :, i])
        return np.stack([found[head] for head in sorted(found)], axis=3)


@pytest.fixture
def make():
    ends = []

    def one(lanes, **fields):
        ends.append(End(lanes, **fields))
        return ends[-1]

    yield one
    for end in ends:
        end.close()


def groups(make, model, source_size, target_size, lanes=("tcp",), **fields):
    source = Group(make, lanes, model, source_size, epoch=SOURCE_EPOCH, seed=1, **fields)
    return source, Group(make, lanes, model, target_size, epoch=TARGET_EPOCH, seed=2, **fields)


def check(source, target, request=None, cuts=(60, 61), limit_s=5.0):
    request = request or Request(100, 7)
    others = sorted(set(range(200)) - set(request.target_slots))
    before = target.kv(others)
    target.receive(request.expected())
    source.send(request.orders(target.address(), *cuts))
    arrivals = [endings.received for endings in target.endings(limit_s)]
    assert [[arrival.first_token_id for arrival in found] for found in arrivals] == [[42]] * len(target.ends)
    assert [endings.sent for endings in source.endings()] == [["r"]] * len(source.ends)
    assert np.array_equal(target.kv(request.target_slots), source.kv(request.source_slots[request.start :]))
    assert np.array_equal(target.kv(others), before)
    moved = [sum(e.transfers[0].num_bytes for e in group.endings()) for group in (source, target)]
    assert moved[0] == moved[1] == sum(end.kv(request.target_slots).nbytes for end in target.ends)


@pytest.mark.parametrize(
    ("model", "source_size", "target_size"),
    [
        (MANY, 1, 2),
        (MANY, 2, 1),
        (MANY, 2, 3),
        (MANY, 4, 3),  # 2, 2, 1 and 1 heads to 2 each
        (MANY, 1, 6),
        (FEW, 1, 4),
        (FEW, 4, 2),  # two of the senders have nothing to do
        (FEW, 2, 8),
        (FEW, 3, 4),
    ],
)
def test_all_heads_arrive(make, model, source_size, target_size):
    check(*groups(make, model, source_size, target_size))


@pytest.mark.parametrize(
    ("lane", "place"),
    [
        ("shm", "host"),
        ("nixl", "host"),
        pytest.param("shm", "interpreted", marks=pytest.mark.skipif(not HAS_TRITON, reason="for Triton")),
        *(pytest.param(lane, "gpu", marks=pytest.mark.gpu) for lane in ("shm", "nixl", "tcp")),
    ],
)
def test_by_every_lane(make, lane, place):
    if lane == "nixl" and not HAS_NIXL:
        pytest.skip("nixl is not installed")
    # Triton's interpreter is slow, and one thread's at a time; on a GPU its kernels are compiled first.
    slow = {"limits": LIMITS._replace(silence_s=20.0)} if place in ("interpreted", "gpu") else {}
    check(*groups(make, MANY, 2, 3, (lane,), place=place, **slow), Request(20, 7), (12, 13), limit_s=20)


@pytest.mark.gpu
@pytest.mark.parametrize(("source_size", "target_size"), [(2, 3), (3, 2), (1, 2)])
def test_from_the_memory_of_several_gpu_processes(make, source_size, target_size):
    with Nodes(ctx=multiprocessing.get_context("spawn")) as nodes:
        source = Group(nodes.End, ("p2p",), MANY, source_size, epoch=SOURCE_EPOCH, seed=1, place="gpu")
        target = Group(make, ("p2p",), MANY, target_size, epoch=TARGET_EPOCH, seed=2, place="gpu")
        check(source, target)
        for end in source.ends:
            end.close()


def test_one_after_the_other_by_the_same_ends(make):
    source, target = groups(make, MANY, 2, 3, ("shm",))
    other = Group(make, ("shm",), MANY, 1, epoch=TARGET_EPOCH, seed=3)
    check(source, target)
    for group in (source, target):
        for end in group.ends:
            for found in end.endings:
                found.clear()
    check(source, other)  # ends that are used again send other heads now


# ------------------------------------------------------------ what goes wrong


def test_if_one_rank_fails_all_do_at_once(make):
    source, target = groups(make, MANY, 2, 1)
    request = Request()
    target.receive(request.expected())
    before = target.kv(request.target_slots)
    first = request.orders(target.address(), 50)[0]
    for end in source.ends:
        end.send(first)
    while (target.kv(request.target_slots)[:, :, 49] == before[:, :, 49]).any():
        time.sleep(0.01)
    source.ends[1].cancel("r")
    assert [endings.failed[0].reason for endings in target.endings(limit_s=0.5)]
    assert "the connection" in source.ends[0].wait(limit_s=0.5).failed[0].reason
    assert source.ends[1].wait().failed[0].reason == "cancelled"


def test_a_rank_that_never_comes_is_waited_for_as_long_as_a_silent_one(make):
    source, target = groups(make, MANY, 2, 1)
    request = Request()
    target.receive(request.expected())
    orders = request.orders(target.address())
    source.ends[0].send(orders[-1], 42)
    assert source.ends[0].wait().sent == ["r"]  # this part has come through
    time.sleep(0.2)
    assert not any(target.ends[0].poll())
    target.ends[0].cancel("r")
    assert target.endings()[0].failed


def test_ranks_that_have_nothing_for_each_other(make):
    source, target = groups(make, MANY, 2, 2)
    request = Request()
    target.receive(request.expected())
    wrong = ",".join(end.address() for end in reversed(target.ends))
    source.send(request.orders(wrong))
    reasons = [endings.failed[0].reason for endings in source.endings()]
    assert "rank 0 of 2 has nothing for rank 1 here; it expects 1" in reasons[0]
    assert "rank 1 of 2 has nothing for rank 0 here; it expects 0" in reasons[1]
    source.send(Request(request_id="s").orders(target.address()))
    assert [endings.received[0].request_id for endings in target.endings()] == ["r", "r"]


def test_too_many_ranks(make):
    source, _ = groups(make, MANY, 2, 1)
    source.send(Request().orders(",".join(["tcp://127.0.0.1:1"] * 13)))
    reason = source.endings()[0].failed[0].reason
    assert "a node of 13 ranks: 12 heads cannot be spread over 13 ranks" in reason
    assert source.ends[0].fault() == "bad_layout"


def test_two_nodes_that_mean_the_same_ticket(make):
    source, target = groups(make, MANY, 2, 1)
    third = Group(make, ("tcp",), MANY, 3, epoch=SOURCE_EPOCH, seed=1)
    request = Request()
    target.receive(request.expected(source=KVSource(node_id="P", epoch=SOURCE_EPOCH, ticket=request.ticket)))
    orders = request.orders(target.address())
    source.ends[0].send(orders[-1], 42)
    source.ends[0].wait()
    third.ends[2].send(orders[-1], 42)
    assert "the ticket was used" in third.ends[2].reason()
    source.ends[1].send(orders[-1], 42)
    assert target.endings()[0].received


def test_ranks_must_tell_the_same_first_token(make):
    source, target = groups(make, MANY, 2, 1)
    request = Request()
    target.receive(request.expected())
    orders = request.orders(target.address())
    source.ends[0].send(orders[-1], 42)
    source.ends[0].wait()
    source.ends[1].send(orders[-1], 43)
    assert "another rank has another first token" in target.endings()[0].failed[0].reason


def test_no_rank_takes_what_another_ranks_promise_did_not_cover(make, monkeypatch):
    """One sender, two receivers: the second begins while a cancellation waits for the first promise."""
    monkeypatch.setattr(lane, "LANES", {**lane.LANES, "here": "tests.transfer.here:HereLane"})
    limits = LIMITS._replace(kept_s=2.0, silence_s=5.0, ticket_s=3.0)
    source = Group(make, ("here",), MANY, 1, epoch=SOURCE_EPOCH, seed=1, limits=limits)
    target = Group(make, ("here",), MANY, 2, epoch=TARGET_EPOCH, seed=2, limits=limits)
    (end,), request = source.ends, Request(5)
    first, second = (one.gate() for one in target.ends)
    target.ends[0].receive(request.expected(), first)
    source.send(request.orders(target.address()))
    time.sleep(0.2)
    cancelling = threading.Thread(target=end.cancel, args=("r",))
    cancelling.start()
    time.sleep(0.4)
    target.ends[1].receive(request.expected(), second)
    time.sleep(0.2)
    target.ends[0].open(first)
    cancelling.join(3)
    assert end.wait().transfers
    end.change(request.source_slots)
    target.ends[1].open(second)
    received = [bool(ending.received) for ending in target.endings()]
    assert received == [True, False]
