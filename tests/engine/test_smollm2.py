"""The default model in fp32 against transformers on the same dequantised weights, token by token.

The prompts were chosen without near-ties, so tokens are equal, not merely close.
"""

import pytest
import torch

from lightllm.attention.registry import load_backend
from lightllm.device.kv_pool import KVPool
from lightllm.layers.native_ops import NativeOps
from lightllm.layers.ops import Ops
from lightllm.models import load_model
from lightllm.sampling_params import SamplingParams
from lightllm.server.model_files import describe_files, locate_model, open_tokenizer
from lightllm.weights.base import PackedTensor
from lightllm.weights.sources import open_weights
from tests.engine.harness import LocalEngine
from tests.native.available import library_or_skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.xdist_group("smollm2")]

NUM_TOKENS = 16
NUM_SLOTS = 4000
PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "The first president of the United States was",
    "Photosynthesis is the process by which",
    "A prime number is a number that",
    "The largest planet in our solar system is",
    "In computer science, a hash table is",
    "The theory of evolution was proposed by",
]


@pytest.fixture(scope="module")
def parts():
    files = locate_model()
    description = describe_files(files, {})
    return description.config, open_weights(files.path), open_tokenizer(files)


@pytest.fixture(scope="module")
def prompts(parts):
    encoded = [parts[2].encode(prompt) for prompt in PROMPTS]
    long = [token for ids in encoded for token in ids] * 4  # several chunks
    return [*encoded, long]


@pytest.fixture(scope="module")
def expected(parts, prompts):
    """Greedy continuations by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, source, _ = parts
    oracle = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=True,
        )
    )
    tensors = {}
    for name in source.names():
        tensor = source.load(name)
        tensors[name] = tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor
    missing, unexpected = oracle.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"], missing  # tied
    assert unexpected == []
    oracle.eval()
    oracle.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = oracle.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module", params=["torch", "native"])
def model(request, parts):
    library = library_or_skip() if request.param == "native" else None
    backend = load_backend(request.param, library)
    config, source, _ = parts
    built = load_model(
        config,
        source,
        dtype=torch.float32,
        backend=backend,
        ops=Ops() if library is None else NativeOps(library),
        num_threads=2,
        progress=lambda done, total: None,
    )
    return built, backend


@pytest.mark.parametrize(
    ("at_once", "enable_overlap", "enable_prefix_cache"),
    [(False, False, False), (True, False, False), (True, True, False), (True, True, True)],
    ids=["alone", "together", "overlap", "overlap+cache"],
)
def test_tokens_equal_those_of_transformers(
    parts, model, prompts, expected, at_once, enable_overlap, enable_prefix_cache
):
    config = parts[0]
    engine = LocalEngine(
        *model,
        KVPool(config, NUM_SLOTS + 1, torch.float32),
        num_slots=NUM_SLOTS,
        max_len=1024,
        vocab_size=config.vocab_size,
        enable_overlap=enable_overlap,
        enable_prefix_cache=enable_prefix_cache,
    )
    params = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    try:
        assert engine.run(prompts, params, at_once=at_once) == expected
    finally:
        engine.close()
