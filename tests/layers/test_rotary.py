"""Rotary positions against transformers, and what of a config is refused."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from lightllm.errors import ModelLoadError
from lightllm.layers.ops import Ops
from lightllm.layers.rotary import SCALINGS, local_rotary_embedding, rotary_embedding
from lightllm.model_config import ModelConfig

MAX_LEN = 2048
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 256,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0 + 0.7 * i for i in range(16)],
}
EXAMPLES = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    LLAMA3,
    YARN,
    {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    {**YARN, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0},
    LONGROPE,
    {**LONGROPE, "attention_factor": 1.2},
    {**LONGROPE, "factor": 32.0},
]


def config(rope_scaling: dict[str, Any] | None, **changes: Any) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=8,
        max_position_embeddings=MAX_LEN,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        rope_scaling=rope_scaling,
        **changes,
    )


def hf_config(scaling: dict[str, Any] | None, cls: Any = LlamaConfig, **changes: Any) -> Any:
    original = (scaling or {}).get("original_max_position_embeddings")
    # Phi-3 has this key outside of the others.
    outside = {"original_max_position_embeddings": original} if cls is Phi3Config and original else {}
    return cls(
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LEN,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": 5000.0, **changes},
        pad_token_id=0,
        **outside,
    )


def assert_same_angles(
    hf: Any, scaling: dict[str, Any] | None, positions: torch.Tensor, max_len: int, **changes: Any
) -> None:
    cos, sin = hf(torch.empty(1), positions[None])
    got = rotary_embedding(config(scaling, **changes), max_len)(positions)
    for ours, theirs in zip(got, (cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs[0, :, : ours.shape[1]], rtol=1e-4, atol=2e-4)


def test_every_type_of_scaling_has_an_example() -> None:
    assert {example["rope_type"] for example in EXAMPLES} == {*SCALINGS}


@pytest.mark.parametrize("scaling", [None, *EXAMPLES])
def test_angles_equal_transformers(scaling: dict[str, Any] | None) -> None:
    positions = torch.tensor([0, 1, 17, 300, MAX_LEN - 1])  # the last makes transformers choose the long list
    assert_same_angles(LlamaRotaryEmbedding(hf_config(scaling)), scaling, positions, MAX_LEN)


def test_rotated_heads_equal_transformers() -> None:
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 17, 300, 2047])
    x = torch.randn(5, 3, 32)
    cos, sin = LlamaRotaryEmbedding(hf_config(YARN))(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    Ops().rotate_(x, *rotary_embedding(config(YARN), MAX_LEN)(positions))
    torch.testing.assert_close(x, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-4)


def test_short_sequences_use_the_short_list() -> None:
    positions = torch.tensor([0, 1, 17, 255])
    hf = LlamaRotaryEmbedding(hf_config(LONGROPE))
    assert_same_angles(hf, LONGROPE, positions, 256)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_angles(hf, LONGROPE, positions, 257)


def test_part_of_a_head() -> None:
    half = {**LONGROPE, "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    for scaling in (None, half):
        hf = Phi3RotaryEmbedding(hf_config(scaling, Phi3Config, partial_rotary_factor=0.5))
        assert_same_angles(hf, scaling, torch.tensor([0, 5, 2000]), MAX_LEN, partial_rotary_factor=0.5)


def test_dynamic_scaling_beyond_the_trained_context() -> None:
    """As if transformers had seen the tokens one by one."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    hf = LlamaRotaryEmbedding(hf_config(scaling))
    rotary = rotary_embedding(config(scaling), 2 * MAX_LEN)
    positions = torch.tensor([100, MAX_LEN - 1, MAX_LEN, MAX_LEN + 700, 2 * MAX_LEN - 1])
    together = rotary(positions)
    for i, position in enumerate(positions):
        expected = hf(torch.empty(1), position[None, None])
        for ours, theirs in zip(together, expected, strict=True):
            torch.testing.assert_close(ours[i], theirs[0, 0, :16], rtol=1e-3, atol=1e-3)


def test_local_layers_have_a_base_of_their_own_and_no_scaling() -> None:
    positions = torch.tensor([0, 3, 900])
    local = local_rotary_embedding(config(YARN, rope_local_base_freq=300.0))(positions)
    plain = rotary_embedding(config(None), MAX_LEN)
    assert torch.equal(local_rotary_embedding(config(YARN))(positions)[0], plain(positions)[0])
    expected = positions[:, None] * 300.0 ** (-torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(local[1], expected.sin(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scaling", "complaint"),
    [
        (
            {"rope_type": "mrope"},
            r"rope_scaling: got rope_type 'mrope', supported are dynamic, linear, llama3",
        ),
        ({"rope_type": "linear"}, "rope_scaling: key 'factor' is missing"),
        ({"rope_type": "dynamic", "factor": -1.0}, r"factor: got -1\.0"),
        ({**LLAMA3, "low_freq_factor": None}, "key 'low_freq_factor' is missing"),
        ({**LLAMA3, "low_freq_factor": 4.0}, r"low_freq_factor: got 4\.0, expected less than 4\.0"),
        ({**LLAMA3, "original_max_position_embeddings": None}, "key 'original_max_position_embeddings' is"),
        ({**YARN, "original_max_position_embeddings": 1}, "original_max_position_embeddings: got 1"),
        ({**YARN, "truncate": "yes"}, "truncate: got 'yes'"),
        ({**YARN, "factor": "4"}, "factor: got '4', expected a number"),
        ({**LONGROPE, "long_factor": [1.0] * 15}, r"long_factor: got .* \(15\), expected 16 numbers"),
        ({**LONGROPE, "long_factor": [1.0] * 15 + [0]}, "long_factor"),
        ({**LONGROPE, "long_factor": None}, r"long_factor: got \[\] \(0\)"),
    ],
)
def test_refusals_name_the_key(scaling: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelLoadError, match=complaint):
        rotary_embedding(config(scaling), MAX_LEN)


@pytest.mark.parametrize("share", [0.01, 0.11])
def test_a_share_that_is_no_rotation_is_refused(share: float) -> None:
    with pytest.raises(ModelLoadError, match="partial_rotary_factor: rotates"):
        rotary_embedding(config(None, partial_rotary_factor=share), MAX_LEN)
