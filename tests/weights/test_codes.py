"""Codes by blocks of 32: exact where the packing has that form, near it elsewhere."""

import pytest
import torch

from lightllm.weights import codes
from lightllm.weights.base import PackedTensor
from lightllm.weights.codes import CONVERTERS, Codes4, Codes8, codes_of, quantize4, quantize8
from lightllm.weights.dequant import UNPACKERS
from lightllm.weights.gguf import BLOCK_LAYOUTS
from tests.weights.synthetic import random_blocks


def packed(kind: str, rows: int = 9) -> PackedTensor:
    layout = BLOCK_LAYOUTS[kind]
    blocks = 512 // layout.block_size
    return PackedTensor(kind, torch.from_numpy(random_blocks(kind, rows, blocks)), (rows, 512))


@pytest.mark.parametrize("kind", UNPACKERS)
def test_codes_stand_for_the_same_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "TILE_ELEMENTS", 2048)
    tensor = packed(kind)
    tiles = list(codes_of(tensor))
    assert len(tiles) == 3
    got, expected = torch.cat([tile.dequantize() for tile in tiles]), tensor.dequantize()
    error = (got - expected).norm() / expected.norm()
    # Q4_K multiplies two scales, and their product is rounded to float16.
    assert error < (1e-3 if kind == "Q4_K" else 1e-6 if kind in CONVERTERS else 0.008)
    assert len({type(tile) for tile in tiles}) == 1


@pytest.mark.parametrize(("quantize", "kind", "steps"), [(quantize8, Codes8, 254), (quantize4, Codes4, 15)])
def test_quantised_weights_are_within_half_a_step(quantize, kind, steps: int) -> None:
    torch.manual_seed(0)
    weights = torch.randn(6, 96)
    weights[2, 32:64] = 0.0
    got = quantize(weights)
    assert isinstance(got, kind)
    blocks = weights.view(6, 3, 32)
    span = 2 * blocks.abs().amax(-1) if steps == 254 else blocks.amax(-1) - blocks.amin(-1)
    error = (got.dequantize().view(6, 3, 32) - blocks).abs().amax(-1)
    assert (error <= span / steps * 0.5 + 2e-3 * span).all()
    assert not got.dequantize()[2, 32:64].any()
