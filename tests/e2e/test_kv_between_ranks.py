"""Prefill and decode nodes of several ranks, as many or not: tokens as from one engine alone."""

import os
import signal
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


@pytest.fixture
def make_pair(tmp_path):
    nodes = []

    def make(prefill_size, decode_size):
        nodes.append(EngineNode(ranks("prefill", prefill_size), tmp_path))
        nodes.append(EngineNode(ranks("decode", decode_size), tmp_path))
        return Pair(*nodes)

    yield make
    for node in nodes:
        node.close()


def ranks_of(node):
    pid = node.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child) for child in children if b"lightllm.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def check_tokens(pair):
    """Prompts of several lengths, answered as by one engine alone; the second one and its answer."""
    single = Single(pair.prefill)
    tokens = open_tokenizer(locate_model()).encode("".join(f"{i}. {TEXT}" for i in range(20)))
    prompts = [tokens[n : 2 * n] for n in (1, 17, 129, 400)]
    found = [pair.finish(name) for name in [pair.start(prompt, GREEDY) for prompt in prompts]]
    assert found == [single(prompt, GREEDY) for prompt in prompts]
    assert pair.run(tokens[700:800], SAMPLED) == single(tokens[700:800], SAMPLED)
    idle(pair.prefill)
    idle(pair.decode)
    return prompts[1], found[1]


@pytest.mark.parametrize(("prefill_size", "decode_size"), [(1, 2), (2, 1), (2, 3)])
def test_nodes_of_different_sizes(make_pair, prefill_size, decode_size):
    pair = make_pair(prefill_size, decode_size)
    assert pair.decode.info.kv_address.count("tcp://") == decode_size
    check_tokens(pair)


def test_each_rank_moves_its_own_part(make_pair):
    pair = make_pair(2, 2)
    assert pair.decode.info.kv_address.count("tcp://") == 2
    assert pair.prefill.info.kv_layout.tp_size == 2
    prompt, answer = check_tokens(pair)
    # A node that loses a rank is gone as a whole; the other one computes the prompt itself or fails it.
    os.kill(ranks_of(pair.prefill)[1], signal.SIGKILL)
    assert pair.prefill.process.wait(timeout=10) == 1
    alone = SamplingParams(max_new_tokens=4, ignore_eos=True)
    assert Single(pair.decode)(prompt, alone) == answer[:4]
