"""A prefill and a decode engine, as processes, with the default model: tokens as from one engine alone."""

import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from lightllm.messages import AbortRequest, EngineRequest, KVSource, KVTarget, RenewLeases
from lightllm.sampling_params import SamplingParams
from lightllm.server.model_files import locate_model, open_tokenizer
from tests.e2e.kv_nodes import EngineNode, Pair, node_config
from tests.transfer.frame_proxy import FrameProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("kv_nodes")]

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(
    max_new_tokens=14,
    ignore_eos=True,
    do_sample=True,
    temperature=1.0,
    top_k=20,
    seed=7,
    repetition_penalty=1.2,
    frequency_penalty=0.5,
)
TEXT = (
    "A radix tree is a data structure that represents a space-optimized trie in which each node that is "
    "the only child is merged with its parent. Unlike regular trees, the key at each node is compared "
    "chunk of bits by chunk of bits. They are useful for associative arrays, and for routing tables. "
)


@pytest.fixture(scope="module")
def tokens():
    """Plenty of ids of English text, never the same sentence twice at the same place."""
    tokenizer = open_tokenizer(locate_model())
    return tokenizer.encode("".join(f"{i}. {TEXT}" for i in range(130)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def pair(directory):
    with ThreadPoolExecutor() as starters:
        prefill, decode = starters.map(
            lambda name: EngineNode(node_config(name), directory), ("prefill", "decode")
        )
    yield Pair(prefill, decode)
    prefill.close()
    decode.close()


class Single:
    """What one engine alone says: the prefill node's, asked without any transfer."""

    def __init__(self, node):
        self.node, self.num_requests = node, 0

    def __call__(self, prompt, params, **fields):
        self.num_requests += 1
        name = f"single{self.num_requests}"
        self.node.send(
            EngineRequest(request_id=name, prompt_token_ids=prompt, sampling_params=params, **fields)
        )
        self.node.finish(name)
        return self.node.token_ids(name)


@pytest.fixture(scope="module")
def single(pair):
    return Single(pair.prefill)


def idle(node):
    """Wait until a node holds no KV but what is cached; its numbers then."""
    until_s = time.monotonic() + 2
    while (stats := node.stats()).kv_used_tokens or stats.requests_running or stats.requests_waiting:
        assert time.monotonic() < until_s, stats
        time.sleep(0.01)
    return stats


def test_tokens_are_those_of_one_engine_for_all_lengths(pair, single, tokens):
    lengths = [1, 2, 17, 128, 129, 2000]
    prompts = [tokens[n : 2 * n] for n in lengths]
    expected = [single(prompt, GREEDY) for prompt in prompts[::2]]
    names = [pair.start(prompt, GREEDY) for prompt in prompts]
    found = [pair.finish(name) for name in names]
    expected_rest = [single(prompt, GREEDY) for prompt in prompts[1::2]]
    assert found[::2] == expected
    assert found[1::2] == expected_rest
    idle(pair.prefill)
    idle(pair.decode)


def test_only_what_the_decode_node_lacks_is_sent(pair, single, tokens):
    prompt = tokens[3000:3200]
    first = pair.start(prompt, GREEDY)
    output = pair.finish(first)
    again = pair.start(prompt, GREEDY)
    assert pair.finish(again) == output == single(prompt, GREEDY)
    longer = [*prompt, *output, *tokens[100:150]]
    more = pair.start(longer, GREEDY)
    assert pair.finish(more) == single(longer, GREEDY)
    reserved = pair.decode.reserved
    assert reserved[f"{first}d"] < 40  # the sentences resemble each other
    assert reserved[f"{again}d"] == len(prompt) - 1
    assert reserved[f"{more}d"] >= len(prompt) + len(output) - 1


def test_samples_of_one_prompt_with_a_seed(pair, single, tokens):
    prompt = tokens[3300:3400]
    expected = [single(prompt, SAMPLED, sample_index=i) for i in range(3)]
    leader = pair.start(prompt, SAMPLED, sample_index=0)
    assert pair.finish(leader) == expected[0]
    siblings = [pair.start(prompt, SAMPLED, sample_index=i) for i in (1, 2)]
    assert [pair.finish(name) for name in siblings] == expected[1:]
    assert len({tuple(ids) for ids in expected}) == 3


def test_a_failed_over_request_goes_on_where_it_stopped(pair, single, tokens):
    prompt = tokens[3500:3600]
    expected = single(prompt, SAMPLED)
    known = expected[:6]
    assert pair.run(prompt, SAMPLED, known=known) == expected[6:]
    leg = EngineRequest(
        request_id="computes-itself",
        prompt_token_ids=prompt,
        output_token_ids=known,
        sampling_params=SAMPLED,
    )
    pair.decode.send(leg)
    assert pair.decode.finish("computes-itself").finish_reason == "length"
    assert pair.decode.token_ids("computes-itself") == expected[6:]


def test_a_first_token_that_ends_the_request(pair, single, tokens):
    prompt = tokens[3700:3750]
    first = single(prompt, GREEDY)[0]
    params = SamplingParams(max_new_tokens=12, stop_token_ids=[first])
    name = pair.start(prompt, params)
    assert pair.prefill.finish(f"{name}p").finish_reason == "stop"
    assert pair.prefill.token_ids(f"{name}p") == [first]
    pair.decode.send(AbortRequest(request_id=f"{name}d"))
    assert pair.decode.finish(f"{name}d").finish_reason in ("stop", "abort", "error")
    assert pair.decode.token_ids(f"{name}d") == []
    idle(pair.decode)


def test_an_abort_in_mid_transfer_frees_both_ends(pair, tokens):
    name = pair.start_in_transfer(tokens[4000:5500], GREEDY)
    pair.prefill.send(RenewLeases(request_ids=[f"{name}p", "nobody"]))
    pair.decode.send(AbortRequest(request_id=f"{name}d"))
    assert pair.decode.finish(f"{name}d", 1).finish_reason == "abort"
    last = pair.prefill.finish(f"{name}p", 5)
    assert (last.finish_reason, last.error.code) == ("error", "kv_transfer_failed")
    idle(pair.prefill)
    idle(pair.decode)


def test_a_decode_node_that_expects_nothing_or_had_another_life(pair, tokens):
    info = pair.decode.info
    for name, epoch in (("unexpected", info.kv_epoch), ("former", info.kv_epoch - 1)):
        target = KVTarget(node_id="D", epoch=epoch, address=info.kv_address, ticket="nobody-knows-it")
        pair.prefill.send(
            EngineRequest(
                request_id=name, prompt_token_ids=tokens[:40], sampling_params=GREEDY, send_kv_to=target
            )
        )
        last = pair.prefill.finish(name, 15)
        assert (last.finish_reason, last.error.code) == ("error", "kv_transfer_failed")
    idle(pair.prefill)


def test_a_decode_node_that_dies_between_complete_and_its_answer(pair, directory, tokens):
    """It has accepted and decodes; the sender, which has not heard of it, gives its slots up all the same."""
    dying = EngineNode(node_config("decode-3", "shm"), directory)
    proxy = FrameProxy(dying.info.kv_address, 0)
    dying.info = msgspec.structs.replace(dying.info, kv_address=proxy.address)
    other = Pair(pair.prefill, dying)
    other.num_requests = 2000
    try:
        # Behind challenge, welcome and the answer to the one block comes that to COMPLETE.
        proxy.harm = "back", 3, "hold"
        name = other.start(tokens[:60], GREEDY)
        assert proxy.reached.wait(20)
        dying.wait(lambda: dying.outputs[f"{name}d"])
        dying.process.kill()
        proxy.release.set()
        last = pair.prefill.finish(f"{name}p", 5)
        assert (last.finish_reason, last.error.code) == ("error", "kv_transfer_failed")
        assert len(pair.prefill.token_ids(f"{name}p")) == 1
    finally:
        dying.close()
        proxy.close()
    idle(pair.prefill)


@pytest.mark.parametrize("lane", ["tcp"])
def test_the_other_lane_and_nodes_that_are_killed(pair, single, directory, tokens, lane):
    prompt = tokens[5600:5900]
    other = Pair(pair.prefill, EngineNode(node_config("decode-2", lane), directory))
    other.num_requests = 1000
    try:
        assert other.run(prompt, GREEDY) == single(prompt, GREEDY)
        name = other.start_in_transfer(tokens[2:1502], GREEDY)
        other.decode.process.kill()
        last = pair.prefill.finish(f"{name}p", 5)
        assert (last.finish_reason, last.error.code) == ("error", "kv_transfer_failed")
    finally:
        other.decode.close()
    idle(pair.prefill)
    # And the other way round; the last test, because the prefill node dies of it.
    name = pair.start_in_transfer(tokens[3:1503], GREEDY)
    pair.prefill.process.kill()
    last = pair.decode.finish(f"{name}d", 5)
    assert (last.finish_reason, last.error.code) == ("error", "kv_transfer_failed")
    idle(pair.decode)
    leg = EngineRequest(request_id="alone", prompt_token_ids=prompt, sampling_params=GREEDY)
    pair.decode.send(leg)
    assert pair.decode.finish("alone").finish_reason == "length"


def test_the_source_must_be_the_one_that_was_named(pair):
    source = KVSource(node_id="P", epoch=1, ticket="never-comes")
    pair.decode.send(
        EngineRequest(
            request_id="waits", prompt_token_ids=[1] * 50, sampling_params=GREEDY, recv_kv_from=source
        )
    )
    pair.decode.wait(lambda: "waits" in pair.decode.reserved)
    assert pair.decode.stats().kv_used_tokens == 50
    pair.decode.send(AbortRequest(request_id="waits"))
    assert pair.decode.finish("waits", 1).finish_reason == "abort"
    idle(pair.decode)
