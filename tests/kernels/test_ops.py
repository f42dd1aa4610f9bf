"""Norms, rotary and activations against their plain versions."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton, which is not installed here")

from lightllm.kernels import ref
from lightllm.layers.ops import Ops
from lightllm.layers.triton_ops import TritonOps

GPU = pytest.mark.gpu
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=GPU), pytest.param(torch.float16, marks=GPU)]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
OPS = TritonOps()
# The interpreter's sigmoid is 1 / (1 + exp(-x)) in numpy, which warns where that is 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def check(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    tolerance = TOLERANCES[got.dtype]
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


SHAPES = [(1, 64), (3, 576), pytest.param((256, 4096), marks=GPU), pytest.param((8192, 8192), marks=GPU)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = random(*shape, dtype=dtype, device=device)
    residual = random(*shape, dtype=dtype, device=device, seed=1)
    weight = random(shape[1], dtype=dtype, device=device, seed=2)
    check(OPS.rms_norm(x, weight, 1e-5), Ops().rms_norm(x, weight, 1e-5))
    expected_residual = residual.clone()
    expected = Ops().add_rms_norm(x, expected_residual, weight, 1e-5)
    check(OPS.add_rms_norm(x, residual, weight, 1e-5), expected)
    assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads_inside_a_larger_tensor(dtype: torch.dtype, device: torch.device) -> None:
    qkv = random(5, 8, 32, dtype=dtype, device=device)
    weight = random(32, dtype=dtype, device=device, seed=2)
    check(OPS.rms_norm(qkv[:, 2:7], weight, 1e-6), ref.rms_norm(qkv[:, 2:7], weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim", "rotary_dim"), [(12, 64, 64), (3, 16, 16), (9, 96, 48)])
def test_rotate(heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    x = random(4, heads + 2, head_dim, dtype=dtype, device=device)
    angles = random(4, rotary_dim // 2, dtype=torch.float32, device=device, seed=1) * 50
    expected = x.clone()
    ref.rotate_(expected[:, :heads], angles.cos(), angles.sin())
    OPS.rotate_(x[:, :heads], angles.cos(), angles.sin())
    check(x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 1536), pytest.param((512, 11008), marks=GPU)])
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul"])
def test_activations(name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    gate_up = random(shape[0], 2 * shape[1], dtype=dtype, device=device) * 3
    check(getattr(OPS, name)(gate_up), getattr(Ops(), name)(gate_up))


def test_nothing_to_do(device: torch.device) -> None:
    x = torch.empty(0, 64, device=device)
    weight = torch.ones(64, device=device)
    assert OPS.rms_norm(x, weight, 1e-5).shape == (0, 64)
    assert OPS.silu_and_mul(x).shape == (0, 32)
    OPS.rotate_(torch.empty(0, 2, 8, device=device), *torch.empty(2, 0, 4, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "num_columns"),
    [
        (30, 64),
        (9, 1500),
        (16, 2048),
        pytest.param(22016, 4096, marks=GPU),
        pytest.param(4096, 11008, marks=GPU),
    ],
)
def test_one_row_through_a_linear(
    num_rows: int, num_columns: int, has_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    weight = random(num_rows, num_columns, dtype=dtype, device=device) * num_columns**-0.5
    bias = random(num_rows, dtype=dtype, device=device, seed=1) if has_bias else None
    linear = OPS.dense_linear(weight, bias)
    for n in (1, 2):
        x = random(n, num_columns, dtype=dtype, device=device, seed=2)
        check(linear(x), ref.linear(x, weight, bias))
        gate_up = random(n, 2 * num_columns, dtype=dtype, device=device, seed=3)
        for name in ("silu_and_mul", "gelu_and_mul"):
            got = OPS.gated_linear(name, gate_up, linear)
            check(got, Ops().gated_linear(name, gate_up, Ops().dense_linear(weight, bias)))
