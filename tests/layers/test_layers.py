"""Norm, rotary positions and activation against transformers and plain formulas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lightllm.errors import ModelLoadError
from lightllm.layers.activation import check_activation, gated_activation
from lightllm.layers.norm import RMSNorm
from lightllm.layers.ops import Ops
from lightllm.layers.rotary import RotaryEmbedding
from lightllm.model_config import ModelConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def config(rope_scaling: dict[str, Any] | None, theta: float = 10000.0) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=8,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=rope_scaling,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_rms_norm(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(5, 96) * scale).to(dtype), torch.randn(96).to(dtype)
    kept = x.clone()
    got = RMSNorm(weight, 1e-5, Ops())(x)
    assert got.dtype == dtype
    assert torch.equal(x, kept)
    torch.testing.assert_close(got, functional.rms_norm(x, (96,), weight, 1e-5))


def test_add_rms_norm_changes_the_residual_in_place() -> None:
    x, residual, weight = torch.randn(5, 96), torch.randn(5, 96), torch.randn(96)
    total = x + residual
    got = RMSNorm(weight, 1e-5, Ops()).add(x, residual)
    assert torch.equal(residual, total)
    torch.testing.assert_close(got, functional.rms_norm(total, (96,), weight, 1e-5))


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_rotary_equals_transformers(scaling: dict[str, Any] | None) -> None:
    hf_config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": 5000.0},
    )
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 17, 300, 2047])
    x = torch.randn(5, 3, 32)
    cos, sin = LlamaRotaryEmbedding(hf_config)(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    Ops().rotate_(x, *RotaryEmbedding(config(scaling, 5000.0))(positions))
    torch.testing.assert_close(x, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_unknown_scaling_is_refused(kind: str) -> None:
    with pytest.raises(ModelLoadError, match=f"got rope_type '{kind}', supported are linear, llama3"):
        RotaryEmbedding(config({"rope_type": kind, "factor": 2.0}))


def test_missing_scaling_value_is_named() -> None:
    with pytest.raises(ModelLoadError, match="low_freq_factor: got None"):
        RotaryEmbedding(config(LLAMA3 | {"low_freq_factor": None}))


def test_rotation_leaves_the_rest_of_a_head_alone() -> None:
    x = torch.randn(4, 3, 32)
    kept = x.clone()
    angles = torch.rand(4, 8)
    Ops().rotate_(x, angles.cos(), angles.sin())
    assert torch.equal(x[..., 16:], kept[..., 16:])
    assert not torch.equal(x[..., :16], kept[..., :16])


@pytest.mark.parametrize(
    ("name", "function"),
    [("silu", functional.silu), ("gelu_pytorch_tanh", lambda x: functional.gelu(x, approximate="tanh"))],
)
def test_gated_activation(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    got = gated_activation(name, Ops())(torch.cat((gate, up), dim=1))
    torch.testing.assert_close(got, function(gate) * up)


def test_other_activations_are_refused() -> None:
    check_activation("silu")
    with pytest.raises(ModelLoadError, match="got 'relu'"):
        check_activation("relu")
