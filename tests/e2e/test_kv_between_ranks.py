"""Prefill and decode nodes of several ranks, as many or not: tokens as from one engine alone."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from lightllm.sampling_params import SamplingParams
from lightllm.server.model_files import locate_model, open_tokenizer
from tests.e2e.kv_nodes import EngineNode, Pair, node_config
from tests.e2e.test_kv_between_engines import GREEDY, SAMPLED, TEXT, Single, idle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("kv_nodes")]


def ranks(role, size):
    config = node_config(role)
    parallel = msgspec.structs.replace(config.parallel, tp=size)
    return msgspec.structs.replace(config, parallel=parallel)


class Nodes:
    """Nodes by role and size, started when a pair first needs them; all are closed at the end."""

    def __init__(self, directory):
        self.directory = directory
        self.found = {}
        self.num_pairs = 0

    def pair(self, prefill_size, decode_size):
        """What is not there yet is started side by side. No two pairs give requests the same names."""
        wanted = [("prefill", prefill_size), ("decode", decode_size)]
        missing = [key for key in wanted if key not in self.found]
        with ThreadPoolExecutor() as starters:
            made = starters.map(lambda key: EngineNode(ranks(*key), self.directory), missing)
            self.found |= dict(zip(missing, made, strict=True))
        pair = Pair(*(self.found[key] for key in wanted))
        pair.num_requests = 100 * self.num_pairs
        self.num_pairs += 1
        return pair

    def close(self):
        for node in self.found.values():
            node.close()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    nodes = Nodes(tmp_path_factory.mktemp("kv"))
    yield nodes
    nodes.close()


def ranks_of(node):
    pid = node.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child) for child in children if b"lightllm.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def check_tokens(pair):
    """Prompts of several lengths, answered as by one engine alone; the second one and its answer.

    Each pair has prompts of its own: what a shared node has cached would be neither computed nor sent.
    """
    single = Single(pair.prefill)
    single.num_requests = pair.num_requests
    tokens = open_tokenizer(locate_model()).encode("".join(f"{i}. {TEXT}" for i in range(20)))
    tokens = tokens[7 * pair.num_requests // 100 :]
    prompts = [tokens[n : 2 * n] for n in (1, 17, 129, 400)]
    found = [pair.finish(name) for name in [pair.start(prompt, GREEDY) for prompt in prompts]]
    assert found == [single(prompt, GREEDY) for prompt in prompts]
    assert pair.run(tokens[700:800], SAMPLED) == single(tokens[700:800], SAMPLED)
    idle(pair.prefill)
    idle(pair.decode)
    return prompts[1], found[1]


@pytest.mark.parametrize(("prefill_size", "decode_size"), [(1, 2), (2, 1), (2, 3)])
def test_nodes_of_different_sizes(nodes, prefill_size, decode_size):
    pair = nodes.pair(prefill_size, decode_size)
    assert pair.decode.info.kv_address.count("tcp://") == decode_size
    check_tokens(pair)


def test_each_rank_moves_its_own_part(nodes):
    pair = nodes.pair(2, 2)
    assert pair.decode.info.kv_address.count("tcp://") == 2
    assert pair.prefill.info.kv_layout.tp_size == 2
    prompt, answer = check_tokens(pair)
    # A node that loses a rank is gone as a whole, so this is the last test; the other one computes the prompt
    # itself or fails it.
    os.kill(ranks_of(pair.prefill)[1], signal.SIGKILL)
    assert pair.prefill.process.wait(timeout=10) == 1
    alone = SamplingParams(max_new_tokens=4, ignore_eos=True)
    assert Single(pair.decode)(prompt, alone) == answer[:4]
