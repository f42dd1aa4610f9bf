"""Parts of tensors are what the whole has there, from every source."""

import pytest
import torch
from safetensors.torch import save_file

from lightllm.errors import ModelLoadError
from lightllm.server.model_files import locate_model
from lightllm.weights.base import PackedTensor
from lightllm.weights.dummy import DummySource
from lightllm.weights.safetensors import SafetensorsSource
from lightllm.weights.sources import open_weights


def dense(tensor: torch.Tensor | PackedTensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor


def check(source, name: str, rows: range, columns: range | None) -> None:
    whole, part = dense(source.load(name)), source.load_part(name, rows, columns)
    wanted = whole[rows.start : rows.stop]
    if columns is not None:
        wanted = wanted[:, columns.start : columns.stop]
    assert tuple(part.shape) == tuple(wanted.shape)
    assert torch.equal(dense(part), wanted)


@pytest.mark.parametrize("kind", ["safetensors", "dummy"])
def test_plain_tensors(kind, tmp_path):
    shapes = {"a.weight": (7, 12), "a.bias": (7,)}
    if kind == "dummy":
        source = DummySource(shapes, "bfloat16", seed=1)
    else:
        tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        source = SafetensorsSource(tmp_path)
    assert source.block_size("a.weight") == 1
    check(source, "a.weight", range(2, 6), range(3, 11))
    check(source, "a.weight", range(7), range(1, 2))
    check(source, "a.weight", range(6, 7), range(12))
    check(source, "a.bias", range(3, 7), None)


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("self_attn.q_proj", range(64, 448), range(576)),  # whole heads, whose rows the file has interleaved
        ("self_attn.q_proj", range(100, 130), range(32, 96)),  # parts of two heads
        ("self_attn.k_proj", range(191, 192), range(576)),
        ("self_attn.o_proj", range(576), range(192, 576)),
        ("mlp.gate_proj", range(512, 1024), range(576)),
        ("mlp.down_proj", range(3, 5), range(768, 1536)),
        ("input_layernorm", range(100, 200), None),
    ],
)
def test_the_default_model(name, rows, columns):
    source = open_weights(locate_model().path)
    check(source, f"model.layers.3.{name}.weight", rows, columns)


def test_a_block_is_not_cut():
    source = open_weights(locate_model().path)
    name = "model.layers.0.mlp.down_proj.weight"
    assert source.block_size(name) == 32
    assert source.block_size("model.norm.weight") == 1
    with pytest.raises(ModelLoadError, match="blocks of 32 cannot be cut"):
        source.load_part(name, range(576), range(16, 64))
