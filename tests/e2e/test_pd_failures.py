"""Faults of every process of a PD cluster, one kind a test, with streams running; real engines, two masters.

Every stream's tokens are those of a single node. After each fault nobody holds any KV, and the next request
is right.
"""

import asyncio
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Server
from tests.e2e.fleet import (
    FREEZE_S,
    Answer,
    Fleet,
    Prompt,
    ask_one_node,
    describe_model,
    freeze,
    kill,
    pids_of,
    stream,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.xdist_group("e2e")]

# docs/pd.md: what a node's loss costs at most; and what the machine of the test may be late.
LIMIT_S = 10.0 + 2.0
NUM_STREAMS = 12
NUM_TOKENS = 200


class Cluster:
    """A fleet, and prompts whose answers are known."""

    def __init__(self, model: list[str], env: dict[str, str]) -> None:
        self.prompts = ask_one_node(model, env, 8)
        self.fleet = Fleet(model, env)
        self.prefill, self.decode, self.other = self.fleet.start(["prefill", "decode", "decode"])

    def ports(self) -> list[int]:
        return [port_of(master) for master in self.fleet.masters]

    def run_during(self, trouble, *, seconds: float) -> list[list[Answer]]:
        """Streams one behind the other to both masters, for so long; some way in, trouble in a thread.

        Returns:
            All answers by master; those of a master that has been killed are its clients' own business.
        """

        async def client(port: int, number: int, end_s: float) -> list[Answer]:
            found: list[Answer] = []
            while time.monotonic() < end_s:
                prompt = self.prompts[(number + len(found)) % len(self.prompts)]
                found.append(await stream(port, prompt, NUM_TOKENS))
                if found[-1].wrong:
                    break
            return found

        async def main() -> list[list[list[Answer]]]:
            end_s = time.monotonic() + seconds
            clients = [
                [asyncio.create_task(client(port, i, end_s)) for i in range(NUM_STREAMS // 2)]
                for port in self.ports()
            ]
            await asyncio.sleep(0.5)
            await asyncio.to_thread(trouble)
            return [list(await asyncio.gather(*tasks)) for tasks in clients]

        return [[answer for one in per_master for answer in one] for per_master in asyncio.run(main())]

    def check(self, answers: list[Answer]) -> None:
        """All are right, and nobody waited too long."""
        assert len(answers) >= NUM_STREAMS // 2
        assert [(a.wrong, a.error) for a in answers if a.wrong or a.error] == []
        assert max(answer.gap_s for answer in answers) < LIMIT_S

    def check_base(self) -> None:
        """Nothing is left, and the next request of each master is right."""
        assert self.fleet.wait_idle() == []
        for port in self.ports():
            self.check_one(port, self.prompts[0])

    def check_one(self, port: int, prompt: Prompt) -> None:
        answer = asyncio.run(stream(port, prompt, NUM_TOKENS))
        assert (answer.wrong, answer.error, answer.is_whole) == ("", "", True)


def port_of(server: Server) -> int:
    return int(server.url.rpartition(":")[2])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(*describe_model(tmp_path_factory.mktemp("fleet")))
    yield found
    assert set(found.fleet.stop()) == {0}


@pytest.mark.parametrize("kind", ["kill engine", "kill frontend"])
def test_a_process_of_a_prefill_and_of_a_decode_node_is_killed(cluster: Cluster, kind: str) -> None:
    names = cluster.prefill, cluster.decode
    answers = cluster.run_during(lambda: cluster.fleet.trouble(kind, *names), seconds=3)
    cluster.check([answer for one in answers for answer in one])
    cluster.check_base()


def test_a_whole_prefill_node_and_the_engine_of_a_decode_node_freeze(cluster: Cluster) -> None:
    """The one falls silent, the other lives on, and leaves its masters when its engine does not answer."""
    nodes = cluster.fleet.nodes
    pids = [*pids_of(nodes[cluster.prefill]), nodes[cluster.decode].children()["engine"]]
    answers = cluster.run_during(lambda: freeze(pids), seconds=3)
    cluster.check([answer for one in answers for answer in one])
    for name in (cluster.prefill, cluster.decode):
        cluster.fleet.wait_for(name)
    cluster.check_base()


def test_a_prefill_node_comes_back_at_the_same_address(cluster: Cluster) -> None:
    """Under the same name, in another epoch: what is meant for its former life is refused."""
    fleet = cluster.fleet
    old = fleet.nodes[cluster.prefill]
    port, kv_port = port_of(old), kv_port_of(fleet, old)

    def restart() -> None:
        kill(fleet.nodes.pop(cluster.prefill))
        cluster.prefill = fleet.add("prefill", "--kv_port", str(kv_port), port=port)

    cluster.check([a for one in cluster.run_during(restart, seconds=3) for a in one])
    new = fleet.nodes[cluster.prefill]
    assert (port_of(new), kv_port_of(fleet, new)) == (port, kv_port)
    before = new.metric("kv_transfers_total", 'outcome="ok"')
    fleet.masters[0].generate(cluster.prompts[0].token_ids[::-1], max_new_tokens=4)  # cached nowhere
    new.wait_until(lambda: new.metric("kv_transfers_total", 'outcome="ok"') > before)
    cluster.check_base()


def kv_port_of(fleet: Fleet, node: Server) -> int:
    page = fleet.masters[0].client.get("/cluster", headers={"accept": "application/json"}).json()
    address = node.url.removeprefix("http://")
    (found,) = (entry["kv_address"] for entry in page["nodes"] if entry["address"] == address)
    return int(found.rpartition(":")[2])


def test_a_frozen_master_goes_on_where_it_stopped_and_nobody_needs_a_config_server(cluster: Cluster) -> None:
    """Its nodes give its requests up after 6 s; when it wakes up it sends what its clients have to others."""
    pids = [*pids_of(cluster.fleet.masters[0]), *pids_of(cluster.fleet.directory)]
    frozen, other = cluster.run_during(lambda: freeze(pids), seconds=3)
    cluster.check(other)
    assert [(a.wrong, a.error) for a in frozen if a.wrong or a.error] == []
    assert FREEZE_S - 1 < max(answer.gap_s for answer in frozen) < FREEZE_S + LIMIT_S
    cluster.check_base()


def test_a_killed_master_costs_its_own_clients_only(cluster: Cluster) -> None:
    fleet = cluster.fleet
    answers = cluster.run_during(lambda: kill(fleet.masters[0]), seconds=3)
    cluster.check(answers[1])
    # Its clients' connections broke, none got a wrong token.
    broken = [answer.wrong for answer in answers[0] if answer.wrong]
    assert len(broken) == NUM_STREAMS // 2
    assert all("broke" in text or "cut off" in text for text in broken)
    fleet.masters.pop(0)
    cluster.check_base()
    # A new one is found by all nodes.
    fleet.masters.insert(0, fleet.start_master())
    for name in fleet.nodes:
        fleet.wait_for(name)
    cluster.check_base()


def test_a_killed_config_server_is_missed_by_new_nodes_only(cluster: Cluster) -> None:
    fleet = cluster.fleet

    def trouble() -> None:
        kill(fleet.directory)
        fleet.directory = fleet.start_directory()

    cluster.check([a for one in cluster.run_during(trouble, seconds=3) for a in one])
    # It knows all masters again, or a new node would not find them.
    fleet.trouble("drain", cluster.other)
    (cluster.other,) = (n for n in fleet.nodes if n not in (cluster.prefill, cluster.decode))
    cluster.check_base()


def test_a_full_decode_node_makes_requests_wait(cluster: Cluster) -> None:
    """All but one decode node are gone, and that one has room for two requests at a time."""
    fleet = cluster.fleet
    small = fleet.add("decode", kv_tokens=2 * (500 + NUM_TOKENS))
    for name in (cluster.decode, cluster.other):
        assert fleet.nodes.pop(name).stop() == 0
    answers = [a for one in cluster.run_during(lambda: time.sleep(2), seconds=3) for a in one]
    assert [(a.wrong, a.error) for a in answers if a.wrong or a.error] == []
    assert len(answers) >= NUM_STREAMS
    cluster.check_base()
    assert fleet.nodes[small].metric("kv_total_tokens") == 2 * (500 + NUM_TOKENS)


def test_two_masters_answer_alike_and_one_alone_goes_on(cluster: Cluster) -> None:
    """Neither the config_server nor the other master is needed for traffic. The cluster's last test."""
    fleet = cluster.fleet
    asked = {"max_new_tokens": 8, "do_sample": True, "seed": 3}
    ids = cluster.prompts[0].token_ids
    texts = {tuple(master.generate(ids, **asked)["generated_text"]) for master in fleet.masters}
    assert len(texts) == 1
    assert fleet.directory.stop() == 0
    assert fleet.masters.pop(0).stop() == 0
    answer = fleet.masters[0].generate(ids[::-1], max_new_tokens=8, ignore_eos=True)
    assert answer["count_output_tokens"] == 8
