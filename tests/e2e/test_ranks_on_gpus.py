"""Two GPUs against one: the same tokens and scores, whatever a step is made of; and a rank that is lost."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch

from lightllm.messages import AbortRequest, EngineRequest
from lightllm.sampling_params import SamplingParams
from tests.e2e.kv_nodes import EngineNode, node_config
from tests.e2e.test_kv_between_devices import CONFIG, TOKENIZER, prompt_of, scored

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("kv_nodes"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

EVEN, UNEVEN = (8, 4), (9, 3)  # heads and KV heads
LENGTHS = (1, 2, 17, 64, 65, 130, 400, 900)
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(
    max_new_tokens=12, ignore_eos=True, logprobs=2, do_sample=True, temperature=0.8, top_k=20, seed=5
)
PENALISED = SamplingParams(
    max_new_tokens=12, ignore_eos=True, logprobs=2, repetition_penalty=1.3, prompt_logprobs=1
)
# In float32; bfloat16 rounds sums of two halves otherwise than sums of all.
EPSILON = {"float32": 1e-3, "bfloat16": 0.1}
# Steps of the same size enough for a graph of it.
ROUNDS = 4


@pytest.fixture
def start(tmp_path):
    nodes = []

    def run(tp, heads=EVEN, dtype="float32", **environment):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 64}
        (folder / "config.json").write_text(json.dumps({**CONFIG, **shape}))
        (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        config, replace = node_config("normal", model_dir=str(folder)), msgspec.structs.replace
        config = replace(
            config,
            engine=replace(config.engine, device="cuda", batch_max_tokens=600, chunked_prefill_size=300),
            model=replace(config.model, load_format="dummy", dtype=dtype),
            parallel=replace(config.parallel, tp=tp),
        )
        nodes.append(EngineNode(config, tmp_path, **environment))
        return nodes[-1]

    yield run
    for node in nodes:
        node.close()


def answers(node, params):
    """What a node says, one by one and then to all at once, several times; prompts begin alike."""
    found = {}
    for round_number in range(ROUNDS):
        prompts = {
            f"{params.seed}-{params.repetition_penalty}-{round_number}-{length}": prompt_of(900)[:length]
            for length in LENGTHS
        }
        for name, prompt in prompts.items():
            node.send(EngineRequest(request_id=name, prompt_token_ids=prompt, sampling_params=params))
            if round_number == 0:
                node.finish(name)
        for name in prompts:
            assert node.finish(name).finish_reason == "length"
            found[name] = node.outputs[name]
    return found


def check(ours, theirs, epsilon):
    """The golden rule; see test_kv_between_devices.py."""
    assert ours.keys() == theirs.keys()
    num_ties = 0
    for name, outputs in ours.items():
        pairs = list(zip(scored(outputs), scored(theirs[name]), strict=True))
        assert len(pairs) == 12
        for (token_id, score, _), (wanted_id, wanted, lead) in pairs:
            if token_id != wanted_id:
                assert lead < epsilon, (name, pairs)
                num_ties += 1
                break
            assert score == pytest.approx(wanted, abs=epsilon), name
    return num_ties


def start_both(start, **environment):
    """A node of one rank and one of two; the environment is for the latter."""
    with ThreadPoolExecutor() as starters:
        nodes = starters.submit(start, 1), starters.submit(start, 2, **environment)
        return [node.result() for node in nodes]


@pytest.mark.parametrize("heads", [EVEN, UNEVEN])
def test_two_gpus_say_what_one_says(start, heads):
    one, two = start_both(partial(start, heads=heads))
    for params in (GREEDY, SAMPLED, PENALISED):
        assert check(answers(two, params), answers(one, params), EPSILON["float32"]) <= len(LENGTHS)
    prompt_scores = [
        [
            entry.logprob
            for output in node.outputs["None-1.3-0-400"]
            for entry in output.prompt_logprobs or []
            if entry
        ]
        for node in (one, two)
    ]
    assert len(prompt_scores[0]) == 399
    assert prompt_scores[1] == pytest.approx(prompt_scores[0], abs=EPSILON["float32"])
    assert two.stats().kv_used_tokens == one.stats().kv_used_tokens == 0


def test_two_gpus_in_bfloat16(start):
    one, two = start_both(partial(start, dtype="bfloat16"))
    check(answers(two, GREEDY), answers(one, GREEDY), EPSILON["bfloat16"])


def test_sums_through_sockets_as_between_two_machines(start):
    """NCCL without NVLink, PCIe and shared memory."""
    sockets = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET": "Socket"}
    one, two = start_both(start, **sockets)
    check(answers(two, GREEDY), answers(one, GREEDY), EPSILON["float32"])


def test_a_rank_is_killed_in_mid_decode(start):
    node = start(2)
    long = SamplingParams(max_new_tokens=1000, ignore_eos=True)
    for name in ("a", "b"):
        node.send(EngineRequest(request_id=name, prompt_token_ids=prompt_of(20), sampling_params=long))
    node.wait(lambda: len(node.outputs["a"]) > 20 and len(node.outputs["b"]) > 20)
    node.send(AbortRequest(request_id="b"))
    assert node.finish("b", 2).finish_reason == "abort"
    engine = node.process.pid
    ranks = [
        int(pid)
        for pid in Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
        if b"lightllm.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(ranks) == 2
    killed = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    assert node.process.wait(timeout=10) == 1
    assert time.monotonic() - killed < 10
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
