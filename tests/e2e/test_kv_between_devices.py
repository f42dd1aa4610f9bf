"""Prefill and decode engines on one GPU or two, as processes: tokens and scores are those of one alone."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import torch

from lightllm.messages import AbortRequest, EngineRequest
from lightllm.sampling_params import SamplingParams
from tests.e2e.conftest import TINY_CONFIG
from tests.e2e.kv_nodes import EngineNode, Pair, node_config
from tests.e2e.test_kv_between_engines import idle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("kv_nodes"),
]

DEVICE = "cuda"
LANES = ("p2p", "shm", "tcp")
CONFIG = {
    **TINY_CONFIG,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
# Nothing here reads text: the tokenizer's file is only compared.
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=2)
EPSILON = 1e-3
NUM_CHUNKS = 12  # of some 30: by then the two nodes have greeted each other
LENGTHS = (1, 2, 17, 64, 65, 400, 2000)


def prompt_of(length, seed=0):
    """Ids in no order."""
    return [(31 * i * i + 17 * i + 101 * seed + 7 * length) % 4093 + 3 for i in range(length)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def make_node(directory):
    folder = directory / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    nodes = []

    def make(name, transport="auto"):
        config, replace = node_config(name, transport, model_dir=str(folder)), msgspec.structs.replace
        engine = replace(config.engine, device=DEVICE, batch_max_tokens=64, chunked_prefill_size=64)
        config = replace(config, engine=engine, model=replace(config.model, load_format="dummy"))
        gpu = str(min(int(name.startswith("decode")), torch.cuda.device_count() - 1))
        nodes.append(EngineNode(config, directory, CUDA_VISIBLE_DEVICES=gpu))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


@pytest.fixture(scope="module")
def prefill(make_node):
    return make_node("prefill")


@pytest.fixture(scope="module", params=LANES)
def pair(request, prefill, make_node):
    """A decode node that takes only this lane, of those that the prefill node offers."""
    decode = make_node("decode", request.param)
    pair = Pair(prefill, decode)
    pair.num_requests = 1000 * LANES.index(request.param)
    yield pair
    decode.close()


def scored(*outputs):
    """(token, its score, lead over the next best) of all that these outputs brought."""
    found = []
    for output in (output for part in outputs for output in part if output.new_token_ids):
        for token_id, entry in zip(output.new_token_ids, output.logprobs, strict=True):
            first, second = sorted(entry.top_logprobs, reverse=True)[:2]
            found.append((token_id, entry.logprob, first - second))
    return found


def alone(node, name, prompt):
    """What one engine says."""
    node.send(EngineRequest(request_id=name, prompt_token_ids=prompt, sampling_params=GREEDY))
    assert node.finish(name).finish_reason == "length"
    return scored(node.outputs[name])


@pytest.fixture(scope="module")
def expected(prefill):
    return {length: alone(prefill, f"single-{length}", prompt_of(length)) for length in LENGTHS}


def check(pair, name, wanted):
    """The golden rule: tokens and scores are those wanted, up to the first that is as good as a tie."""
    pair.finish(name)
    got = scored(pair.prefill.outputs[f"{name}p"], pair.decode.outputs[f"{name}d"])
    assert len(got) == len(wanted)
    for (token_id, score, _), (wanted_id, wanted_score, lead) in zip(got, wanted, strict=True):
        if token_id != wanted_id:
            assert lead < EPSILON, (got, wanted)
            return
        assert score == pytest.approx(wanted_score, abs=EPSILON)


def test_tokens_and_scores_are_those_of_one_engine(pair, expected):
    for length in LENGTHS:
        check(pair, pair.start(prompt_of(length), GREEDY), expected[length])
    names = {length: pair.start([*prompt_of(length, 1)], GREEDY) for length in LENGTHS}
    for length, name in names.items():
        check(pair, name, alone(pair.prefill, f"{name}-alone", prompt_of(length, 1)))
    idle(pair.prefill)
    idle(pair.decode)


def test_only_what_the_decode_node_lacks_is_sent(pair):
    prompt = prompt_of(300, 2)
    wanted = alone(pair.prefill, f"shared-{pair.num_requests}", prompt)
    first = pair.start(prompt, GREEDY)
    check(pair, first, wanted)
    again = pair.start(prompt, GREEDY)
    check(pair, again, wanted)
    assert pair.decode.reserved[f"{first}d"] == 0
    assert pair.decode.reserved[f"{again}d"] == len(prompt) - 1


def test_an_abort_in_mid_transfer_frees_both_ends(pair):
    name = pair.start_in_transfer(prompt_of(1900, 3 + pair.num_requests), GREEDY, NUM_CHUNKS)
    pair.decode.send(AbortRequest(request_id=f"{name}d"))
    assert pair.decode.finish(f"{name}d", 1).finish_reason == "abort"
    last = pair.prefill.finish(f"{name}p", 5)
    assert (last.finish_reason, last.error.code) == ("error", "kv_transfer_failed")
    idle(pair.prefill)
    idle(pair.decode)


def test_steps_of_others_go_on_while_kv_leaves(pair):
    """A long prompt is sent while another request decodes on the same node: both are as they are alone."""
    wanted = alone(pair.prefill, f"beside-{pair.num_requests}", prompt_of(200, 4))
    name = pair.start(prompt_of(2000, 5 + pair.num_requests), GREEDY)
    again = alone(pair.prefill, f"{name}-beside", prompt_of(200, 4))
    pair.finish(name)
    assert [entry[0] for entry in again] == [entry[0] for entry in wanted]
    idle(pair.prefill)


@pytest.mark.parametrize("lane", LANES)
def test_nodes_that_are_killed_in_mid_transfer(make_node, expected, lane):
    nodes = [("prefill-2",), ("prefill-3",), ("decode-2", lane)]
    with ThreadPoolExecutor() as starters:
        prefill, other_prefill, decode = starters.map(lambda arguments: make_node(*arguments), nodes)
    pair = Pair(prefill, decode)
    name = pair.start_in_transfer(prompt_of(2000, 6), GREEDY, NUM_CHUNKS)
    pair.prefill.process.kill()
    last = pair.decode.finish(f"{name}d", 5)
    assert (last.finish_reason, last.error.code) == ("error", "kv_transfer_failed")
    idle(pair.decode)
    # The request goes on where the failed one was: this node computes the prompt itself.
    assert [entry[0] for entry in alone(pair.decode, "itself", prompt_of(400))] == [
        entry[0] for entry in expected[400]
    ]
    # Another prefill node, and the decode node dies.
    pair.prefill.close()
    other = Pair(other_prefill, decode)
    other.num_requests = 500
    check(other, other.start(prompt_of(65), GREEDY), expected[65])
    name = other.start_in_transfer(prompt_of(2000, 7), GREEDY, NUM_CHUNKS)
    other.decode.process.kill()
    last = other.prefill.finish(f"{name}p", 5)
    assert (last.finish_reason, last.error.code) == ("error", "kv_transfer_failed")
    idle(other.prefill)
    other.decode.close()
    other.prefill.close()


def test_a_node_that_is_stopped_closes_what_it_had_open(make_node):
    """A restart at the same place finds the memory free, and transfers go on with the new life."""
    decode = make_node("decode-3", "p2p")
    for life in range(2):
        pair = Pair(make_node(f"prefill-{4 + life}"), decode)
        pair.num_requests = 100 * life
        for length in (64, 400):
            pair.run(prompt_of(length, 8 + life), GREEDY)
        pair.prefill.close()
        time.sleep(0.2)
    idle(decode)
    decode.close()
