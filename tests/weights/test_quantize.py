"""Float weights rounded while they are read: near the floats, in the form that packed kernels read."""

import pytest
import torch

from lightllm.errors import ConfigError, ModelLoadError
from lightllm.weights import quantize as quantizing
from lightllm.weights.base import PackedTensor
from lightllm.weights.codes import codes_of, quantize4, quantize8
from lightllm.weights.gguf import BLOCK_LAYOUTS
from lightllm.weights.quantize import QUANTIZERS, QuantizedSource, quantize
from tests.models.tiny import StateSource


@pytest.mark.parametrize(("kind", "rounded"), [("Q4_1", quantize4), ("Q8_0", quantize8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_keeps_the_codes(kind, rounded, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "TILE_ELEMENTS", 400)  # four rows at a time, and three left
    torch.manual_seed(0)
    weights = torch.randn(11, 96).to(dtype)
    got = quantize(weights, kind)
    assert got is not None
    assert got.shape == (11, 96)
    assert got.data.shape == (11, 3 * BLOCK_LAYOUTS[kind].block_bytes)
    expected = rounded(weights.float()).dequantize()
    assert torch.equal(got.dequantize(), expected)
    assert torch.equal(torch.cat([codes.dequantize() for codes in codes_of(got)]), expected)


@pytest.mark.parametrize(("kind", "limit"), [("Q4_1", 0.09), ("Q8_0", 0.006)])
def test_rounding_loses_little(kind: str, limit: float) -> None:
    torch.manual_seed(1)
    weights = torch.randn(64, 256)
    got = quantize(weights, kind)
    assert got is not None
    assert ((got.dequantize() - weights).norm() / weights.norm()).item() < limit


def test_a_source_packs_what_it_is_told_to() -> None:
    torch.manual_seed(2)
    tensors = {"a.weight": torch.randn(4, 32), "b.weight": torch.randn(4, 32), "norm.weight": torch.randn(32)}
    source = QuantizedSource(
        StateSource(tensors), {"a.weight": "Q4_1", "b.weight": "Q8_0"}, "--quant_type w4"
    )
    assert [*source.names()] == [*tensors]
    assert source.shape("a.weight") == (4, 32)
    loaded = {name: source.load(name) for name in source.names()}
    kinds = {name: t.type if isinstance(t, PackedTensor) else "float" for name, t in loaded.items()}
    assert kinds == {"a.weight": "Q4_1", "b.weight": "Q8_0", "norm.weight": "float"}
    assert loaded["norm.weight"] is tensors["norm.weight"]


def test_what_is_packed_already_is_not_rounded_again() -> None:
    packed = quantize(torch.randn(2, 32), "Q8_0")
    source = QuantizedSource(StateSource({"a.weight": packed}), {"a.weight": "Q4_1"}, "--quant_type w4")
    with pytest.raises(ConfigError, match=r"--quant_type w4: tiny\.safetensors: a\.weight is packed as Q8_0"):
        source.load("a.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e8])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_values_without_a_scale_are_refused(kind: str, value: float) -> None:
    weights = torch.randn(3, 64)
    weights[1, 40] = value
    source = QuantizedSource(StateSource({"a.weight": weights}), {"a.weight": kind}, "--quant_type w8")
    with pytest.raises(ModelLoadError, match=r"a\.weight holds values that are not finite or beyond float16"):
        source.load("a.weight")
