"""Every architecture of the table against transformers: whole, in chunks, token by token and mixed."""

from typing import Any

import pytest
import torch
import transformers

from lightllm.models import ARCHITECTURES
from tests.models.tiny import DIMENSIONS, Sequences, config_of, load, make_oracle, source_of

LENGTHS = (37, 1, 90, 12)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
}

# Options beyond the defaults of an architecture's HF config, all of which must work.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "LlamaForCausalLM": [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": YARN},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}},
    ],
    "MistralForCausalLM": [{"sliding_window": 16}, {"sliding_window": None}],
    "Qwen2ForCausalLM": [
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        {"tie_word_embeddings": True, "rope_parameters": YARN},
    ],
    "Qwen3ForCausalLM": [
        {"attention_bias": True},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ],
    "Gemma2ForCausalLM": [
        {"sliding_window": 16, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 40},
    ],
    "Gemma3ForCausalLM": [
        {
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 40,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        {"num_hidden_layers": 7, "sliding_window": 20},
    ],
    "Phi3ForCausalLM": [
        {"sliding_window": 16},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 256,
        },
    ],
    "InternLM2ForCausalLM": [
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}},
        {"tie_word_embeddings": True},
    ],
    "GlmForCausalLM": [
        {"attention_bias": False, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}}
    ],
    "Glm4ForCausalLM": [
        {"attention_bias": False, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}}
    ],
}
VARIANTS = [
    pytest.param(name, options, id=f"{name}-{i}")
    for name in ARCHITECTURES
    for i, options in enumerate(({}, *OPTIONS.get(name, [])))
]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    size = DIMENSIONS["vocab_size"]
    return [torch.randint(size, (length,), generator=generator).tolist() for length in LENGTHS]


def expected_logits(oracle: transformers.PreTrainedModel) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [oracle(torch.tensor([ids])).logits[0] for ids in prompts()]


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "torch_ref", "native"])
@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
def test_whole_prompts_equal_transformers(architecture: str, options: dict[str, Any], backend: str) -> None:
    oracle = make_oracle(architecture, **options)
    model = load(config_of(oracle), source_of(oracle), backend=backend)
    got = Sequences(model, prompts()).step(dict(enumerate(LENGTHS)))
    for row, expected in enumerate(expected_logits(oracle)):
        assert_equal(got[row], expected)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
def test_mixed_batches_equal_transformers(architecture: str, options: dict[str, Any], backend: str) -> None:
    oracle = make_oracle(architecture, **options)
    sequences = Sequences(load(config_of(oracle), source_of(oracle), backend=backend), prompts())
    got: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    steps = [
        {0: 30},  # a chunk alone
        {2: 64, 0: 1},  # a chunk beside a decode, in another order than the rows
        {0: 1, 1: 1, 2: 20, 3: 12},  # a chunk with a past, a decode, a first token, a whole prompt
        {0: 5, 2: 2},
        *[{2: 1}] * 4,  # decode alone
    ]
    for counts in steps:
        for row, logits in sequences.step(counts).items():
            got[row].append(logits)
    for row, expected in enumerate(expected_logits(oracle)):
        assert_equal(torch.cat(got[row]), expected[: sequences.num_computed[row]])
    assert sequences.num_computed == [37, 1, 90, 12]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_alone_equals_decoding_together(architecture: str) -> None:
    oracle = make_oracle(architecture)
    sequences = Sequences(load(config_of(oracle), source_of(oracle)), prompts())
    expected = expected_logits(oracle)
    sequences.step({0: 20, 2: 25, 3: 6})
    for i in range(5):
        for row, logits in sequences.step({2: 1, 3: 1, 0: 1}).items():
            start = {0: 20, 2: 25, 3: 6}[row]
            assert_equal(logits[0], expected[row][start + i])


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kv_of_each_layer_is_written_when_that_is_said(architecture: str, backend: str) -> None:
    oracle = make_oracle(architecture)
    sequences = Sequences(load(config_of(oracle), source_of(oracle), backend=backend), prompts())
    storage = sequences.pool.storage.fill_(0)  # what nobody has written may be no number
    written: list[tuple[int, torch.Tensor]] = []
    sequences.on_kv_written = lambda layer: written.append((layer, storage.clone()))
    for counts in ({0: 20, 2: 25}, {0: 1, 3: 12}):
        before = storage.clone()
        sequences.step(counts)
        for layer, then in written:
            assert torch.equal(then[:, : layer + 1], storage[:, : layer + 1])
            assert not torch.equal(then[:, layer], before[:, layer])
        assert [layer for layer, _ in written] == list(range(storage.shape[1]))
        written.clear()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_stays_near(architecture: str) -> None:
    oracle = make_oracle(architecture)
    model = load(config_of(oracle), source_of(oracle), dtype=torch.bfloat16)
    sequences = Sequences(model, prompts(), torch.bfloat16)
    got = sequences.step({0: 36, 3: 11})
    last = sequences.step({0: 1, 3: 1})
    expected = expected_logits(oracle)
    for row in (0, 3):
        error = torch.cat((got[row], last[row])) - expected[row]
        assert error.norm() / expected[row].norm() < 0.03
