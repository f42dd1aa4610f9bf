"""What only the lane nixl must see to: when it is worth it, a library with a will, reads that do not end."""

import importlib.metadata
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch

from lightllm.errors import KVTransferError
from lightllm.transfer import LANES, nixl
from lightllm.transfer.channel import Channel
from lightllm.transfer.lane import LaneUnavailable, open_lanes
from lightllm.transfer.nixl import GPU_BLOCK_BYTES, NixlLane, Offer
from lightllm.transfer.nixl_agent import Agent, Place
from tests.transfer.nixl_peer import VALUE
from tests.transfer.nodes import SOURCE_EPOCH, TARGET_EPOCH, End, Request

HAS_NIXL = importlib.util.find_spec("nixl") is not None
needs_nixl = pytest.mark.skipif(not HAS_NIXL, reason="nixl is not installed (the extra lightllm[pd])")
SIZE = 8 * 1024 * 1024


@pytest.fixture
def make_end():
    ends = []

    def make(lanes, epoch):
        ends.append(End(lanes, epoch=epoch, seed=epoch))
        return ends[-1]

    yield make
    for end in ends:
        end.close()


@pytest.fixture
def rdma(monkeypatch, tmp_path):
    """As if there were an RDMA device; UCX takes what there is."""
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(nixl, "RDMA_DEVICES", tmp_path)


def move(source, target, number):
    """One transfer, from its orders to the endings at both ends."""
    request = Request(50, 0, f"r{number}", f"ticket-{number:010}")
    target.receive(request.expected())
    (order,) = request.orders(target.address())
    source.send(order, 42)
    target.wait(number + 1)
    source.wait()


# ------------------------------------------------------------ when it is taken


def test_without_the_package_auto_goes_on_without_it(monkeypatch, rdma, make_end, caplog):
    monkeypatch.setattr(nixl, "PACKAGE", "a_package_that_is_not_there")
    with caplog.at_level("INFO", logger="lightllm.transfer.lane"):
        end = make_end(("shm", "nixl", "tcp"), SOURCE_EPOCH)
    assert end.node.lanes.names == ("shm", "tcp")
    assert (
        "no lane nixl: the package a_package_that_is_not_there is not installed: pip install" in caplog.text
    )
    with pytest.raises(LaneUnavailable, match="is not installed"):
        make_end(("nixl",), SOURCE_EPOCH)


def test_without_rdma_auto_goes_on_without_it(monkeypatch, tmp_path, make_end, caplog):
    monkeypatch.setattr(nixl, "RDMA_DEVICES", tmp_path / "none")
    with caplog.at_level("INFO", logger="lightllm.transfer.lane"):
        end = make_end(("shm", "nixl", "tcp"), SOURCE_EPOCH)
    assert end.node.lanes.names == ("shm", "tcp")
    assert "no lane nixl: there is no RDMA device" in caplog.text


def test_its_place_in_the_order():
    names = list(LANES)
    assert names.index("shm") < names.index("nixl") < names.index("tcp")


@needs_nixl
def test_it_is_not_started_before_a_pair_takes_it(rdma, make_end):
    source, target = (make_end(("shm", "nixl", "tcp"), epoch) for epoch in (SOURCE_EPOCH, TARGET_EPOCH))
    move(source, target, 0)
    assert target.endings.received
    lanes = [end.node.lanes["nixl"] for end in (source, target)]
    assert [lane._agent for lane in lanes] == [None, None]
    only = make_end(("nixl", "tcp"), SOURCE_EPOCH)
    move(only, target, 1)
    assert len(target.endings.received) == 2
    assert only.node.lanes["nixl"]._agent is not None


def offered(**fields):
    version = importlib.metadata.version("nixl") if HAS_NIXL else ""
    offer = Offer(version=version, block_bytes=NixlLane.BLOCK_BYTES)
    return msgspec.msgpack.encode(msgspec.structs.replace(offer, **fields))


@needs_nixl
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (b"\x80", "its offer is not this version's"),
        (offered(version="0.9"), "nixl 0.9 there, "),
        (offered(obstacle="NIXL does not start: x"), "there: NIXL does not"),
        (offered(block_bytes=GPU_BLOCK_BYTES), "one node's KV is on a GPU, the other's is not"),
    ],
)
def test_offers_that_are_declined(make_end, fields, reason):
    lane = NixlLane(make_end(("tcp",), SOURCE_EPOCH).node.rows)
    with pytest.raises(LaneUnavailable, match=reason):
        lane.open_receiver(fields, lane.cut(lane.rows))
    assert lane._agent is None


@needs_nixl
def test_a_receiver_whose_library_does_not_start_takes_the_next_lane(monkeypatch, rdma, make_end):
    source, target = (make_end(("nixl", "tcp"), epoch) for epoch in (SOURCE_EPOCH, TARGET_EPOCH))
    monkeypatch.setenv("UCX_TLS", "no_such_transport")
    for number in range(2):
        move(source, target, number)
    assert len(target.endings.received) == 2
    assert "NIXL does not start" in target.node.lanes["nixl"].obstacle


@needs_nixl
def test_a_sender_whose_library_does_not_start_says_so_in_its_next_offer(monkeypatch, rdma, make_end):
    source, target = (make_end(("nixl", "tcp"), epoch) for epoch in (SOURCE_EPOCH, TARGET_EPOCH))
    target.node.lanes["nixl"].agent()
    monkeypatch.setenv("UCX_TLS", "no_such_transport")
    move(source, target, 0)
    assert "NIXL does not start" in source.endings.failed[0].reason
    move(source, target, 1)
    assert [arrival.request_id for arrival in target.endings.received] == ["r1"]


@needs_nixl
def test_the_only_lane_must_start_at_once(monkeypatch, make_end):
    rows = make_end(("tcp",), SOURCE_EPOCH).node.rows
    monkeypatch.setenv("UCX_TLS", "no_such_transport")
    with pytest.raises(LaneUnavailable, match="nixl: NIXL does not start"):
        open_lanes(("nixl",), rows)


# ------------------------------------------------------------ the library in our process

HYGIENE = """
import json, logging, os, sys, time
import torch
def caught():
    mask, = [line.split()[1] for line in open("/proc/self/status") if line.startswith("SigCgt")]
    return int(mask, 16) & 0x7fffffff  # those above are of the C library
before = caught()
from lightllm.transfer.nixl_agent import Agent
agent = Agent("nixl", torch.device("cpu"))
started = time.process_time()
time.sleep(1)
report = {
    "busy_s": time.process_time() - started,
    "handlers": caught() == before,
    "raises": logging.raiseExceptions,
    "chatty": logging.getLogger("nixl").handlers != [],
}
sys.stderr.write("REPORT" + json.dumps(report))
"""


@needs_nixl
def test_the_library_keeps_to_itself():
    done = subprocess.run([sys.executable, "-c", HYGIENE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    before, _, text = done.stderr.partition("REPORT")
    assert before == ""
    report = json.loads(text)
    assert report.pop("busy_s") < 0.2
    assert report == {"handlers": True, "raises": True, "chatty": False}


@needs_nixl
def test_memory_is_registered_once_and_used_again(make_end):
    source, target = make_end(("nixl",), SOURCE_EPOCH), make_end(("nixl",), TARGET_EPOCH)
    for number in range(8):
        move(source, target, number)
    assert len(target.endings.received) == 8
    agent = target.node.lanes["nixl"].agent()
    (free,), (known,) = agent._free.values(), agent._met.values()
    # The memory of a transfer may come back a little later than its end is known.
    assert len(free) <= 2
    assert len(known) <= 2


# ------------------------------------------------------------ reads


class Peer:
    """A process with memory to read from."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.transfer.nixl_peer", str(SIZE)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.place = msgspec.msgpack.decode(bytes.fromhex(self.process.stdout.readline()), type=Place)

    def freeze(self) -> None:
        """Returns when it does nothing more."""
        self.process.send_signal(signal.SIGSTOP)
        while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)


@pytest.fixture
def by_tcp(monkeypatch):
    """A frozen process can be read from by shared memory; by TCP it must answer."""
    monkeypatch.setenv("UCX_TLS", "tcp")


@pytest.fixture
def peer(by_tcp):
    found = Peer()
    yield found
    found.process.kill()
    found.process.communicate()


@pytest.fixture
def agent(by_tcp):
    found = Agent("nixl", torch.device("cpu"))
    yield found
    found.close()


@pytest.fixture
def ends():
    """A channel, and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        channel = Channel(socket.create_connection(server.getsockname()))
        other, _ = server.accept()
    yield channel, other
    channel.close()
    other.close()


@needs_nixl
def test_a_frozen_peer_is_given_up_and_its_bytes_find_nobody(agent, peer, ends):
    memory, channel = agent.take(SIZE), ends[0]
    agent.read(peer.place, 0, memory, 1000, channel, 5)
    assert memory.data[:1000].eq(VALUE).all()
    memory.data.zero_()
    peer.freeze()
    begun = time.monotonic()
    with pytest.raises(KVTransferError, match=r"nothing came for 0\.5 s"):
        agent.read(peer.place, 0, memory, SIZE, channel, 0.5)
    assert time.monotonic() - begun < 2
    agent.give_back(memory)
    other = agent.take(SIZE)
    assert other is not memory
    other.data.zero_()
    peer.process.send_signal(signal.SIGCONT)
    end = time.monotonic() + 10
    while not memory.data.eq(VALUE).all():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert other.data.eq(0).all()
    while agent.take(SIZE) is not memory:  # it has ended, so the memory may be used again
        assert time.monotonic() < end
        time.sleep(0.01)


@needs_nixl
def test_a_killed_peer_is_noticed_at_once_and_its_memory_is_used_again(agent, peer, ends):
    memory, channel = agent.take(SIZE), ends[0]
    agent.read(peer.place, 0, memory, SIZE, channel, 5)
    peer.freeze()
    threading.Timer(0.3, peer.process.kill).start()
    begun = time.monotonic()
    for _ in range(2):
        with pytest.raises(KVTransferError, match="reading by NIXL: "):
            agent.read(peer.place, 0, memory, SIZE, channel, 10)
    assert time.monotonic() - begun < 3
    agent.give_back(memory)
    assert agent.take(SIZE) is memory


@needs_nixl
def test_a_read_ends_with_its_connection(agent, peer, ends):
    memory, (channel, other) = agent.take(SIZE), ends
    agent.read(peer.place, 0, memory, 1, channel, 5)
    peer.freeze()
    threading.Timer(0.3, lambda: other.shutdown(socket.SHUT_RDWR)).start()
    begun = time.monotonic()
    with pytest.raises(KVTransferError, match="has closed the connection"):
        agent.read(peer.place, 0, memory, SIZE, channel, 10)
    assert time.monotonic() - begun < 2


@needs_nixl
def test_memory_that_the_peer_does_not_have_is_an_error(agent, peer, ends):
    memory = agent.take(SIZE)
    with pytest.raises(KVTransferError, match="reading by NIXL: "):
        agent.read(peer.place, 1, memory, SIZE, ends[0], 5)
    agent.read(peer.place, 0, memory, SIZE, ends[0], 5)
    assert memory.data.eq(VALUE).all()


@needs_nixl
def test_closing_ends_its_threads_and_all_that_it_serves(agent, peer, ends):
    memory, before = agent.take(SIZE), num_threads()
    agent.read(peer.place, 0, memory, SIZE, ends[0], 5)
    agent.close()
    assert num_threads() < before
    with pytest.raises(KVTransferError, match="this node stops"):
        agent.take(SIZE)
    with pytest.raises(KVTransferError, match="this node stops"):
        agent.read(peer.place, 0, memory, SIZE, ends[0], 5)
    agent.give_back(memory)


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@needs_nixl
def test_a_frozen_peer_survives_that_its_reader_closes(agent, peer, ends):
    memory, before = agent.take(SIZE), num_threads()
    agent.read(peer.place, 0, memory, SIZE, ends[0], 5)
    peer.freeze()
    with pytest.raises(KVTransferError, match="nothing came"):
        agent.read(peer.place, 0, memory, SIZE, ends[0], 0.2)
    agent.close()
    assert num_threads() >= before
    peer.process.send_signal(signal.SIGCONT)
    with pytest.raises(subprocess.TimeoutExpired):
        peer.process.wait(2)
    agent.close()  # its answer has come
    assert num_threads() < before


@pytest.mark.parametrize("fields", [{"address": 2**64 - 1}, {"address": -1}, {"device": -1}])
def test_what_cannot_be_a_place_is_none(fields):
    place = Place(agent="a", metadata=b"", address=4096, device=0, is_host=True)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(place), type=Place) == place
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(
            msgspec.msgpack.encode({**msgspec.structs.asdict(place), **fields}), type=Place
        )
