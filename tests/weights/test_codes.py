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


def test_fitting_brings_4_bits_nearer_than_the_ends_of_a_block_do() -> None:
    torch.manual_seed(0)
    weights = torch.randn(64, 256)
    blocks = weights.view(64, 8, 32)
    low, step = blocks.amin(-1, keepdim=True), (blocks.amax(-1) - blocks.amin(-1))[..., None] / 15
    plain = ((blocks - low) / step).round() * step + low
    fitted = quantize4(weights).dequantize().view(64, 8, 32)
    assert (fitted - blocks).square().mean() < 0.88 * (plain - blocks).square().mean()


def test_weights_on_a_grid_of_16_stay_where_they_are() -> None:
    grid = torch.arange(32) % 16 * 0.25 - 1.0
    assert torch.equal(quantize4(grid.repeat(3, 2)).dequantize(), grid.repeat(3, 2))


@pytest.mark.parametrize(("quantize", "kind", "steps"), [(quantize8, Codes8, 254), (quantize4, Codes4, 15)])
def test_quantised_weights_are_within_a_step(quantize, kind, steps: int) -> None:
    torch.manual_seed(0)
    weights = torch.randn(6, 96)
    weights[2, 32:64] = 0.0
    got = quantize(weights)
    assert isinstance(got, kind)
    blocks = weights.view(6, 3, 32)
    span = 2 * blocks.abs().amax(-1) if steps == 254 else blocks.amax(-1) - blocks.amin(-1)
    error = (got.dequantize().view(6, 3, 32) - blocks).abs()
    # Fitting gives up a little at the ends for the sake of the rest.
    assert (error.amax(-1) <= span / steps * (0.5 if steps == 254 else 1.0) + 2e-3 * span).all()
    assert (error.mean(-1) <= span / steps * 0.3 + 1e-3 * span).all()
    assert not got.dequantize()[2, 32:64].any()
