"""Dense and packed linears against the plain formula on unpacked weights."""

import pytest
import torch
from torch.nn import functional

from lightllm.layers.embedding import Embedding
from lightllm.layers.linear import DenseLinear, PackedLinear, stack_rows
from lightllm.weights.base import PackedTensor

BLOCK_BYTES = {"Q4_1": 20, "Q8_0": 34}  # of 32 elements


def packed(kind: str, num_rows: int, num_columns: int, seed: int = 0) -> PackedTensor:
    """Random blocks with scales of a sensible size."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = num_columns // 32
    shape = (num_rows, num_blocks, BLOCK_BYTES[kind])
    data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    num_scales = 2 if kind == "Q4_1" else 1
    scales = torch.rand(num_rows, num_blocks, num_scales, generator=generator) * 0.01
    data[:, :, : 2 * num_scales] = scales.half().view(torch.uint8)
    return PackedTensor(kind, data.view(num_rows, -1), (num_rows, num_columns))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kinds", [("Q4_1",), ("Q8_0",), ("Q4_1", "Q4_1", "Q8_0"), ("Q8_0", "Q4_1", "Q8_0")])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_packed_equals_dense(kinds: tuple[str, ...], has_bias: bool, num_tokens: int) -> None:
    torch.manual_seed(0)
    # 900 rows of 576 are more than one tile.
    parts = [packed(kind, 900 if i == 0 else 40, 576, seed=i) for i, kind in enumerate(kinds)]
    weight = torch.cat([part.dequantize() for part in parts])
    bias = torch.randn(len(weight)) if has_bias else None
    x = torch.randn(num_tokens, 576)
    linear = PackedLinear(stack_rows(parts), bias, torch.float32)
    expected = DenseLinear(weight, bias)(x)
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected, functional.linear(x, weight, bias))


def test_packed_computes_in_its_dtype() -> None:
    part = packed("Q8_0", 64, 64)
    linear = PackedLinear((part,), None, torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    got = linear(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, functional.linear(x, part.dequantize().bfloat16()))


def test_stacking_joins_neighbours_of_one_kind() -> None:
    parts = [packed(kind, 8, 32, seed=i) for i, kind in enumerate(("Q4_1", "Q4_1", "Q8_0", "Q4_1"))]
    stacked = stack_rows(parts)
    assert [(part.type, part.shape) for part in stacked] == [
        ("Q4_1", (16, 32)),
        ("Q8_0", (8, 32)),
        ("Q4_1", (8, 32)),
    ]
    assert stacked[1].data is parts[2].data  # not copied


def test_packed_weight_is_small() -> None:
    part = packed("Q4_1", 100, 64)
    assert PackedLinear((part,), None, torch.float32).num_bytes == 100 * 2 * 20
    assert DenseLinear(part.dequantize()).num_bytes == 100 * 64 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_embedding(kind: str, dtype: torch.dtype) -> None:
    table = packed(kind, 50, 64)
    expected = table.dequantize().to(dtype)
    ids = torch.tensor([0, 49, 3, 3])
    for weight in (PackedLinear((table,), None, dtype), DenseLinear(expected)):
        got = Embedding(weight)(ids)
        assert torch.equal(got, expected[ids])
        got.zero_()
    assert expected[0].any()  # the lookup was a copy: the model adds to it in place
