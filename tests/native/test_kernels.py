"""The C kernels against plain torch, for every instruction set that this processor runs."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightllm.layers.linear import LinearMethod, PackedLinear
from lightllm.layers.native_linear import NativeDense, NativePacked
from lightllm.layers.native_ops import NativeOps
from lightllm.layers.ops import Ops
from lightllm.native import library as native
from lightllm.native.library import NativeLibrary, NativeUnavailable
from lightllm.weights.base import PackedTensor
from lightllm.weights.gguf import BLOCK_LAYOUTS
from tests.native.available import library_or_skip
from tests.weights.synthetic import random_blocks

KERNELS = ("generic", "avx2", "avx512-vnni")
# (rows, in_features, out_features): whole and broken panels, one row and many, more than one block of rows.
SHAPES = ((1, 32, 8), (1, 64, 97), (2, 576, 33), (5, 96, 960), (7, 32, 1), (100, 64, 50), (131, 160, 17))


@pytest.fixture(scope="module", params=KERNELS)
def library(request: pytest.FixtureRequest) -> Iterator[NativeLibrary]:
    yield library_or_skip(2, request.param)
    NativeLibrary(2)  # the choice belongs to the process: leave the best one


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    torch.manual_seed(0)
    return request.param


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("has_bias", [False, True])
def test_dense_linear(library: NativeLibrary, shape: tuple[int, int, int], has_bias: bool) -> None:
    m, k, n = shape
    x, weight = torch.randn(m, k), torch.randn(n, k)
    bias = torch.randn(n) if has_bias else None
    linear = NativeDense(library, weight, bias)
    torch.testing.assert_close(linear(x), functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    indices = torch.tensor([n - 1, 0, n // 2])
    assert torch.equal(linear.rows(indices), weight[indices])
    assert linear.num_bytes >= weight.nbytes


def packed(kind: str, n: int, k: int) -> PackedTensor:
    blocks = random_blocks(kind, n, k // BLOCK_LAYOUTS[kind].block_size)
    return PackedTensor(kind, torch.from_numpy(blocks), (n, k))


def rounded(x: Tensor) -> Tensor:
    """Activations as the kernels round them: to 8 bits by blocks of 32."""
    blocks = x.view(x.shape[0], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = torch.where(largest > 0, blocks * (127 / largest), 0.0).round()
    return (codes * (largest / 127)).view_as(x)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_packed_linear_is_exact_but_for_the_rounding_of_activations(
    library: NativeLibrary, shape: tuple[int, int, int], kind: str
) -> None:
    m, k, n = shape
    tensor, x, bias = packed(kind, n, k), torch.randn(m, k), torch.randn(n)
    linear = NativePacked(library, [tensor], bias)
    expected = functional.linear(rounded(x), tensor.dequantize(), bias)
    assert relative(linear(x), expected) < 1e-5
    indices = torch.tensor([0, n - 1])
    torch.testing.assert_close(linear.rows(indices), tensor.dequantize()[indices])


@pytest.mark.parametrize(("kind", "limit"), [("Q4_K", 0.01), ("Q5_1", 0.01), ("Q6_K", 0.01), ("Q5_K", 0.01)])
def test_other_packings_stay_near_their_oracle(library: NativeLibrary, kind: str, limit: float) -> None:
    torch.manual_seed(1)
    tensor, x = packed(kind, 41, 512), torch.randn(6, 512)
    got = NativePacked(library, [tensor], None)(x)
    assert relative(got, PackedLinear((tensor,), None, torch.float32)(x)) < limit


def test_parts_of_different_packings_stand_below_each_other(library: NativeLibrary) -> None:
    torch.manual_seed(2)
    parts = [packed("Q4_1", 24, 64), packed("Q8_0", 9, 64), packed("Q4_1", 16, 64)]
    x, bias = torch.randn(3, 64), torch.randn(49)
    expected = functional.linear(rounded(x), torch.cat([p.dequantize() for p in parts]), bias)
    assert relative(NativePacked(library, parts, bias)(x), expected) < 1e-5


@pytest.mark.parametrize("kind", ["dense", "Q4_1", "Q8_0"])
def test_a_row_does_not_depend_on_its_batch(library: NativeLibrary, kind: str) -> None:
    torch.manual_seed(3)
    weight, x = torch.randn(70, 96), torch.randn(150, 96)
    linear: LinearMethod = (
        NativeDense(library, weight, None)
        if kind == "dense"
        else NativePacked(library, [packed(kind, 70, 96)], None)
    )
    whole = linear(x)
    for start, stop in ((0, 1), (7, 9), (3, 103), (140, 150)):
        assert torch.equal(linear(x[start:stop]), whole[start:stop])


def test_extreme_activations_stay_finite(library: NativeLibrary) -> None:
    x = torch.zeros(3, 64)
    x[0, 5], x[1] = 1e30, 1e-30
    for kind in ("Q4_1", "Q8_0"):
        assert NativePacked(library, [packed(kind, 8, 64)], None)(x).isfinite().all()


@pytest.mark.parametrize("size", [8, 96, 576, 1001])
@pytest.mark.parametrize("m", [1, 5, 70])
def test_small_operations(library: NativeLibrary, m: int, size: int) -> None:
    torch.manual_seed(4)
    fast, plain = NativeOps(library), Ops()
    wide, weight = torch.randn(m, size + 3), torch.randn(size)
    x = wide[:, :size]  # rows with a gap behind them
    torch.testing.assert_close(fast.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5))
    residual = torch.randn(m, size)
    kept = residual.clone()
    got = fast.add_rms_norm(x.contiguous(), residual, weight, 1e-5)
    torch.testing.assert_close(got, plain.add_rms_norm(x, kept, weight, 1e-5))
    assert torch.equal(residual, kept)
    gate_up = torch.randn(m, 2 * size) * 4
    gate_up[0, 0], gate_up[0, 1] = 200.0, -200.0
    torch.testing.assert_close(fast.silu_and_mul(gate_up), plain.silu_and_mul(gate_up), rtol=1e-5, atol=1e-6)
    # 1 + tanh loses digits where it is near zero; the kernel's form does not.
    torch.testing.assert_close(fast.gelu_and_mul(gate_up), plain.gelu_and_mul(gate_up), rtol=1e-4, atol=1e-5)


def test_norm_of_heads(library: NativeLibrary) -> None:
    x, weight = torch.randn(4, 9, 32)[:, 2:7], torch.randn(32)
    got = NativeOps(library).rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(got, Ops().rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("half", [16, 32, 8])
@pytest.mark.parametrize("m", [1, 90])
def test_rotation(library: NativeLibrary, m: int, half: int) -> None:
    torch.manual_seed(5)
    qkv = torch.randn(m, 11, 64)
    expected = qkv.clone()
    angles = torch.rand(m, half) * 100
    NativeOps(library).rotate_(qkv[:, :7], angles.cos(), angles.sin())
    Ops().rotate_(expected[:, :7], angles.cos(), angles.sin())
    torch.testing.assert_close(qkv, expected)


def test_many_jobs_one_after_the_other_lose_no_part() -> None:
    linear = NativeDense(library_or_skip(4), torch.ones(640, 1), None)
    for i in range(3000):
        assert linear(torch.full((1, 1), float(i))).sum().item() == 640.0 * i


def test_unknown_kernels_are_refused() -> None:
    library_or_skip()
    with pytest.raises(NativeUnavailable, match="'neon5' are unknown"):
        NativeLibrary(1, "neon5")


def test_a_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(NativeUnavailable, match="install a C compiler"):
        NativeLibrary(1)


def test_a_damaged_library_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "kernels.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(NativeUnavailable, match=r"kernels\.so cannot be loaded"):
        NativeLibrary(1)
