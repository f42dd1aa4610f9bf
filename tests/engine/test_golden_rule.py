"""The golden rule: how steps are composed does not change what is generated (architecture.md section 6).

One engine variant after the other runs the same prompts; the oracle runs each prompt alone, unchunked,
without prefix cache and overlap. Where batch shapes are equal (overlap on or off) tokens must be equal.
Elsewhere a first difference is allowed only where the oracle's two best logits are closer than EPSILON.
"""

import pytest
import torch

from lightllm.attention.registry import load_backend
from lightllm.device.kv_pool import KVPool
from lightllm.layers.native_ops import NativeOps
from lightllm.layers.ops import Ops
from lightllm.model_config import ModelConfig
from lightllm.models import load_model, tensor_shapes
from lightllm.sampling_params import SamplingParams
from lightllm.weights.dummy import DummySource
from lightllm.worker.quantization import quantized
from tests.engine.harness import LocalEngine
from tests.native.available import library_or_skip

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=300,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
)
NUM_SLOTS = 3000
EPSILON = 1e-4
SHARED = list(range(40, 140))
PROMPTS = [
    [5],
    [7, 8, 9],
    list(range(10, 43)),
    [*SHARED, 1, 2, 3],
    [*SHARED, 1, 2, 4, 5],
    [*SHARED[:70], 9],
    SHARED * 2,
    [11] * 250,
]
GREEDY = SamplingParams(max_new_tokens=30, ignore_eos=True, logprobs=2)
RANDOM = SamplingParams(
    max_new_tokens=30, ignore_eos=True, do_sample=True, temperature=1.3, top_p=0.9, seed=11
)

VARIANTS = {
    "overlap": {},
    "no_overlap": {"enable_overlap": False},
    "no_prefix_cache": {"enable_prefix_cache": False},
    "small_chunks": {"chunked_prefill_size": 17, "batch_max_tokens": 40},
    "whole_prompts": {"enable_chunked_prefill": False, "batch_max_tokens": 1024},
    "one_row": {"max_running": 1},
    "preempting": {"num_slots": 330, "max_running": 8},
}


@pytest.fixture(scope="module", params=["torch", "native", "native w4"])
def model(request):
    return build(request.param)


def build(variant: str):
    """The model with its backend: `variant` names it, and behind a space how weights are quantised."""
    name, _, quant_type = variant.partition(" ")
    library = library_or_skip() if name == "native" else None
    backend = load_backend(name, library)
    source = DummySource(tensor_shapes(CONFIG), CONFIG.dtype, seed=3)
    built = load_model(
        CONFIG,
        quantized(source, quant_type or "none", CONFIG),
        packed=bool(quant_type),
        dtype=torch.float32,
        backend=backend,
        ops=Ops() if library is None else NativeOps(library),
        num_threads=1,
        progress=lambda done, total: None,
    )
    return built, backend


def engine_of(model, **flags) -> LocalEngine:
    built, backend = model
    num_slots = flags.pop("num_slots", NUM_SLOTS)
    pool = KVPool(CONFIG, num_slots + 1, torch.float32)
    return LocalEngine(
        built,
        backend,
        pool,
        num_slots=num_slots,
        max_len=320,
        vocab_size=CONFIG.vocab_size,
        **flags,
    )


def run(model, params: SamplingParams, *, at_once: bool = True, **flags) -> list[list[int]]:
    engine = engine_of(model, **flags)
    try:
        return engine.run(PROMPTS, params, at_once=at_once)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def oracle(model):
    """Tokens of each prompt alone, and the gap between the two best logits before each of them."""
    engine = engine_of(model, enable_overlap=False, enable_prefix_cache=False, batch_max_tokens=512)
    tokens, gaps = [], []
    for prompt in PROMPTS:
        request = engine.run_detailed(prompt, GREEDY)
        tokens.append([t for output in request for t in output.new_token_ids])
        entries = [entry for output in request for entry in output.logprobs or []]
        gaps.append([entry.top_logprobs[0] - entry.top_logprobs[1] for entry in entries])
    engine.close()
    return tokens, gaps


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_do_not_depend_on_how_steps_are_composed(model, oracle, variant):
    expected, gaps = oracle
    got = run(model, GREEDY, **VARIANTS[variant])
    for tokens, wanted, gap in zip(got, expected, gaps, strict=True):
        assert len(tokens) == len(wanted)
        for position, (a, b) in enumerate(zip(tokens, wanted, strict=True)):
            if a != b:
                assert gap[position] < EPSILON, (variant, position, tokens, wanted)
                break


@pytest.mark.parametrize("params", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_overlap_changes_nothing_at_all(model, params):
    assert run(model, params) == run(model, params, enable_overlap=False)


def test_sampled_tokens_survive_preemption(model):
    plain = run(model, RANDOM)
    engine = engine_of(model, num_slots=330, max_running=8)
    assert engine.run(PROMPTS, RANDOM) == plain
    assert engine.scheduler.stats().preemptions_total > 0
    engine.close()


def test_prompt_logprobs_do_not_depend_on_chunks(model):
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=1)
    found = []
    for flags in ({"batch_max_tokens": 512, "chunked_prefill_size": 512}, {"chunked_prefill_size": 17}):
        engine = engine_of(model, **flags)
        engine.run([PROMPTS[6]], params)  # what is cached must not be left out
        found.append(engine.run_detailed(PROMPTS[6], params)[0].prompt_logprobs)
        engine.close()
    whole, chunked = found
    assert whole is not None
    assert len(whole) == len(PROMPTS[6])
    assert whole[0] is None
    assert [e.logprob for e in whole[1:]] == pytest.approx([e.logprob for e in chunked[1:]], abs=1e-4)


PENALISED = SamplingParams(
    max_new_tokens=40,
    ignore_eos=True,
    do_sample=True,
    temperature=0.1,
    repetition_penalty=1.05,
    frequency_penalty=0.1,
    seed=5,
    logprobs=1,
)


@pytest.mark.parametrize(
    ("params", "enable_overlap"),
    [(GREEDY, True), (GREEDY, False), (RANDOM, True), (PENALISED, True)],
    ids=["greedy", "no_overlap", "random", "penalised"],
)
def test_drafts_change_no_token(model, params, enable_overlap):
    plain = engine_of(model, enable_overlap=enable_overlap)
    drafting = engine_of(model, enable_overlap=enable_overlap, draft_ngram=6)
    for prompt in (PROMPTS[1], PROMPTS[7], [*PROMPTS[2], 17, 23] * 2):
        expected, got = (engine.run_detailed(prompt, params) for engine in (plain, drafting))
        assert _tokens(got) == _tokens(expected)
        logprobs = [[e.logprob for o in outputs for e in o.logprobs or []] for outputs in (expected, got)]
        # Kernels that round activations make much of a last bit, so that these must agree to the last one.
        is_native = model[1].name == "native"
        assert logprobs[1] == (logprobs[0] if is_native else pytest.approx(logprobs[0], abs=1e-4))
        assert len(logprobs[0]) in (0, params.max_new_tokens)
    if params is GREEDY:  # a random model soon repeats itself
        assert drafting.scheduler.stats().steps_total < 0.8 * plain.scheduler.stats().steps_total
    for engine in (plain, drafting):
        engine.close()


def _tokens(outputs):
    return [token for output in outputs for token in output.new_token_ids]


def test_all_memory_comes_back(model):
    engine = engine_of(model)
    engine.run(PROMPTS, GREEDY)
    stats = engine.scheduler.stats()
    assert stats.requests_running == stats.requests_waiting == stats.kv_used_tokens == 0
    assert stats.kv_cached_tokens > 0
    engine.close()
