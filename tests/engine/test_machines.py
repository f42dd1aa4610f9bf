"""The link between the machines of a node: who gets in, who does not, and how the end of it is heard of."""

import pickle
import socket
import threading
import time

import msgspec
import pytest
import zmq

from lightllm import messages
from lightllm.cluster_link import LinkRefused
from lightllm.config import Config, decode_config
from lightllm.engine import machine_link
from lightllm.engine.machine_link import dial_link
from lightllm.engine.machines import Machines
from lightllm.errors import BindError, ClusterError
from lightllm.messages import ScheduledBatch
from lightllm.rank_messages import (
    FromRank,
    MachineAlive,
    MachineHello,
    MachineWelcome,
    RankAlive,
    RankFailed,
    ToMachine,
)
from lightllm.server import other_machine

TOKEN = b"0123456789abcdef0123456789abcdef"
RECORD = {"version": "1", "--tp": "2"}
NOT_OURS = {
    "nothing": b"",
    "bytes": bytes(range(256)) * 10,
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "pickle": pickle.dumps({"node_rank": 1}),
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "a length without end": b"\xff\xff\xff\x7f",
}


def hello(node_rank: int = 1, **record: str) -> MachineHello:
    return MachineHello(node_rank=node_rank, machine="other", record={**RECORD, **record})


class First:
    """Machine 0's side, waiting in a thread."""

    def __init__(self, tmp_path, nnodes: int = 2) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        replace = msgspec.structs.replace
        config = Config()
        self.config = replace(
            config,
            parallel=replace(config.parallel, tp=nnodes, nnodes=nnodes, multinode_port=self.port),
            security=replace(config.security, cluster_token=TOKEN.decode(), api_key=("secret",)),
        )
        self.context = zmq.Context()
        self.inbox = self.context.socket(zmq.PULL)
        address = f"ipc://{tmp_path}/inbox"
        self.inbox.bind(address)
        self.said: list[str] = []
        self.machines = Machines(self.config, RECORD, self.context, address)
        self.thread = threading.Thread(target=self.machines.gather, args=(self.said.append,))
        self.thread.start()

    def dial(self, greeting: MachineHello, token: bytes = TOKEN):
        end = time.monotonic() + 5
        while True:
            try:
                return dial_link("127.0.0.1", self.port, token, greeting)
            except ConnectionRefusedError:
                assert time.monotonic() < end
                time.sleep(0.05)

    def receive(self) -> FromRank:
        assert self.inbox.poll(3000)
        return messages.decode(self.inbox.recv(), FromRank)

    def close(self) -> None:
        self.thread.join(timeout=5)
        self.machines.close()
        self.context.destroy(linger=0)


@pytest.fixture
def first(tmp_path):
    made = First(tmp_path)
    yield made
    made.close()


def take(link) -> ToMachine:
    """The next message that is no heartbeat."""
    while True:
        message = messages.decode(link.receive(), ToMachine)
        if not isinstance(message, MachineAlive):
            return message


def test_a_machine_joins_gets_batches_and_answers(first):
    link = first.dial(hello())
    first.thread.join(timeout=5)
    assert first.said == [f"waiting at 127.0.0.1:{first.port} for machine 1 of 2"] * len(first.said)
    welcome = take(link)
    assert isinstance(welcome, MachineWelcome)
    config = decode_config(welcome.config)
    assert (config.parallel, config.security) == (first.config.parallel, Config().security)
    batch = messages.encode(ScheduledBatch(step_id=7))
    first.machines.send(batch)
    assert take(link) == ScheduledBatch(step_id=7)
    link.send(messages.encode(RankAlive(rank=1)))
    assert first.receive() == RankAlive(rank=1)
    link.close()
    failed = first.receive()
    assert failed == RankFailed(rank=1, message="machine 1 (other) has closed its link")


def test_strangers_do_not_keep_a_machine_out(first):
    strangers = []
    for data in NOT_OURS.values():
        while True:
            try:
                strangers.append(socket.create_connection(("127.0.0.1", first.port)))
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        strangers[-1].sendall(data)
    began = time.monotonic()
    link = first.dial(hello())
    assert isinstance(take(link), MachineWelcome)
    assert time.monotonic() - began < 3
    for stranger in strangers:
        stranger.close()
    link.close()


def test_what_does_not_fit_is_refused_with_its_difference(first):
    for greeting, token, words in (
        (hello(version="2"), TOKEN, "version: 2 there, 1 on machine 0"),
        (hello(extra="x"), TOKEN, "extra: x there, nothing on machine 0"),
        (hello(node_rank=2), TOKEN, "node_rank: 2 there, expected 1..1"),
    ):
        with pytest.raises(LinkRefused) as caught:
            first.dial(greeting, token)
        assert words in caught.value.diff
    with pytest.raises(LinkRefused, match="tokens differ"):
        first.dial(hello(), b"another token than that of ours")
    link = first.dial(hello())
    assert isinstance(take(link), MachineWelcome)
    link.close()


def test_a_machine_that_leaves_before_all_are_there_is_waited_for_again(tmp_path):
    first = First(tmp_path, nnodes=3)
    first.dial(hello(2)).close()
    time.sleep(0.5)
    links = [first.dial(hello(1))]
    time.sleep(0.5)
    assert first.thread.is_alive()
    links.append(first.dial(hello(2)))
    assert all(isinstance(take(link), MachineWelcome) for link in links)
    for link in links:
        link.close()
    first.close()


def test_a_silent_machine_is_lost(first, monkeypatch):
    monkeypatch.setattr(machine_link, "SILENCE_LIMIT_S", 0.5)
    monkeypatch.setattr(machine_link, "ALIVE_INTERVAL_S", 60)
    link = first.dial(hello())
    first.thread.join(timeout=5)
    failed = first.receive()
    assert failed == RankFailed(rank=1, message="machine 1 (other) has not been heard of for 0.5 s")
    assert isinstance(take(link), MachineWelcome)
    with pytest.raises(ClusterError, match="machine 0"):
        take(link)
    link.close()


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        parallel = msgspec.structs.replace(
            Config().parallel, tp=2, nnodes=2, multinode_port=taken.getsockname()[1]
        )
        security = msgspec.structs.replace(Config().security, cluster_token=TOKEN.decode())
        config = msgspec.structs.replace(Config(), parallel=parallel, security=security)
        context = zmq.Context()
        with pytest.raises(BindError, match="--multinode_port"):
            Machines(config, RECORD, context, f"ipc://{tmp_path}/inbox").gather(lambda text: None)
        context.destroy(linger=0)


class NoRanks:
    """Workers that need no model: say one thing, and note who else runs when they are ended."""

    def __init__(self, config, directory, context, address, **places) -> None:
        self.threads_at_end: list[threading.Thread] = []
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.connect(address)
        self._outbox.send(messages.encode(RankAlive(rank=1)))

    def find_dead(self) -> list[RankFailed]:
        return []

    def kill(self) -> None:
        self.threads_at_end = threading.enumerate()
        self._outbox.close(linger=0)


def test_the_thread_that_passes_on_has_ended_before_its_socket_is_closed(first, monkeypatch):
    """zmq may crash where one thread closes what another one polls."""
    made: list[NoRanks] = []

    def start(*args, **places) -> NoRanks:
        made.append(NoRanks(*args, **places))
        return made[-1]

    monkeypatch.setattr(other_machine, "LocalRanks", start)
    link = first.dial(hello())
    first.thread.join(timeout=5)
    before = set(threading.enumerate())
    ended: list[ClusterError] = []

    def serve() -> None:
        with pytest.raises(ClusterError) as caught:
            other_machine._serve(first.config, link)
        ended.append(caught.value)

    serving = threading.Thread(target=serve)
    serving.start()
    assert first.receive() == RankAlive(rank=1)
    assert len(set(threading.enumerate()) - before) == 2
    first.machines.close()
    serving.join(timeout=5)
    assert [str(error) for error in ended] == [f"{link.peer} has closed its link"]
    (ranks,) = made
    assert set(ranks.threads_at_end) - before == {serving}
