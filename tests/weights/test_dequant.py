"""Every unpacker against the `gguf` package: exactly equal, since both only multiply and add in float32."""

import gguf
import numpy as np
import pytest
import torch

from lightllm.weights import dequant
from lightllm.weights.base import PackedTensor
from lightllm.weights.gguf import BLOCK_LAYOUTS
from lightllm.weights.gguf_source import PLAIN_DTYPES
from tests.weights.synthetic import random_blocks


@pytest.mark.parametrize("kind", dequant.UNPACKERS)
def test_unpacked_values_equal_the_oracle(kind: str) -> None:
    packed = random_blocks(kind, rows=7, blocks=3)
    columns = 3 * BLOCK_LAYOUTS[kind].block_size
    want = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    tensor = PackedTensor(kind, torch.from_numpy(packed), (7, columns))
    assert np.array_equal(tensor.dequantize().numpy(), want)
    assert np.array_equal(tensor.dequantize(slice(2, 5)).numpy(), want[2:5])
    assert tensor.dequantize(slice(3, 3)).shape == (0, columns)
    assert np.array_equal(packed, random_blocks(kind, rows=7, blocks=3)), "the packed data was written to"


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_tensors_larger_than_a_chunk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = torch.from_numpy(random_blocks(kind, rows=5, blocks=3))
    columns = 3 * BLOCK_LAYOUTS[kind].block_size
    whole = dequant.dequantize(kind, packed, columns)
    monkeypatch.setattr(dequant, "CHUNK_ELEMENTS", 2 * BLOCK_LAYOUTS[kind].block_size)
    assert torch.equal(dequant.dequantize(kind, packed, columns), whole)


def test_layouts_are_those_of_the_oracle() -> None:
    sizes = {kind.name: tuple(size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {name: sizes[name] for name in BLOCK_LAYOUTS} == {
        name: tuple(layout) for name, layout in BLOCK_LAYOUTS.items()
    }
    assert set(BLOCK_LAYOUTS) == {*dequant.UNPACKERS, *PLAIN_DTYPES}
