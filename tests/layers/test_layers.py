"""Norm, rotation and activation against transformers and plain formulas."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from lightllm.errors import ModelLoadError
from lightllm.layers.activation import ACTIVATIONS, check_activation
from lightllm.layers.linear import DenseLinear
from lightllm.layers.norm import RMSNorm
from lightllm.layers.ops import Ops


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
    got = Ops().gated_linear(ACTIVATIONS[name], torch.cat((gate, up), dim=1), DenseLinear(torch.eye(8), None))
    torch.testing.assert_close(got, function(gate) * up)


def test_other_activations_are_refused() -> None:
    check_activation("silu")
    with pytest.raises(ModelLoadError, match="got 'relu'"):
        check_activation("relu")
