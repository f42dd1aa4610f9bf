"""The GGUF reader and source against the `gguf` package, on made-up files and on the default model."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lightllm.errors import ModelLoadError
from lightllm.server.model_files import locate_model
from lightllm.weights.base import PackedTensor
from lightllm.weights.gguf import GGUFReader
from lightllm.weights.gguf_source import GGUFSource, unpermute_rows
from tests.weights.synthetic import random_blocks, write_gguf

HEADS = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}


@pytest.fixture(scope="module")
def default_reader() -> GGUFReader:
    return GGUFReader(locate_model().path)


@pytest.fixture(scope="module")
def oracle() -> gguf.GGUFReader:
    return gguf.GGUFReader(locate_model().path)


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    tensors = {
        "token_embd.weight": (random_blocks("Q8_0", 6, 2), "Q8_0"),
        "output_norm.weight": np.arange(64, dtype=np.float32),
    }
    return write_gguf(tmp_path / "m.gguf", tensors, {**HEADS, "a.list": [1, 2, 3], "a.text": "caf\u00e9"})


def test_default_metadata_equals_the_oracle(default_reader: GGUFReader, oracle: gguf.GGUFReader) -> None:
    expected = {key: field.contents() for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
    assert default_reader.metadata == expected


def test_default_tensors_equal_the_oracle(default_reader: GGUFReader, oracle: gguf.GGUFReader) -> None:
    expected = {
        t.name: (t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.data_offset, t.n_bytes)
        for t in oracle.tensors
    }
    found = {t.name: (t.type, t.shape, t.offset, t.num_bytes) for t in default_reader.tensors.values()}
    assert found == expected
    for name in ("token_embd.weight", "blk.7.ffn_down.weight", "output_norm.weight"):
        want = next(t for t in oracle.tensors if t.name == name)
        assert bytes(default_reader.data(name)) == want.data.tobytes()


def test_default_source_names_shapes_and_values(default_reader: GGUFReader, oracle: gguf.GGUFReader) -> None:
    source = GGUFSource(default_reader)
    assert len(list(source.names())) == 272
    assert source.shape("model.layers.3.self_attn.k_proj.weight") == (192, 576)
    down = source.load("model.layers.0.mlp.down_proj.weight")
    assert isinstance(down, PackedTensor)
    assert (down.type, down.shape) == ("Q4_1", (576, 1536))
    stored = next(t for t in oracle.tensors if t.name == "blk.0.ffn_down.weight")
    want = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(down.dequantize().numpy(), want)
    assert np.array_equal(down.dequantize(slice(5, 9)).numpy(), want[5:9])
    norm = source.load("model.norm.weight")
    assert isinstance(norm, torch.Tensor)
    assert norm.dtype == torch.float32


@pytest.mark.parametrize("part", ["q", "k"])
def test_rotary_permutation_is_undone(default_reader: GGUFReader, oracle: gguf.GGUFReader, part: str) -> None:
    heads = {"q": 9, "k": 3}[part]
    ours = GGUFSource(default_reader).load(f"model.layers.1.self_attn.{part}_proj.weight")
    assert isinstance(ours, PackedTensor)
    weights = ours.dequantize().numpy()
    # What llama.cpp's converter does to HF weights.
    again = weights.reshape(heads, 2, 32, 576).swapaxes(1, 2).reshape(weights.shape)
    stored = next(t for t in oracle.tensors if t.name == f"blk.1.attn_{part}.weight")
    assert np.array_equal(again, gguf.quants.dequantize(stored.data, stored.tensor_type))


def test_unpermuted_rows_rotate_by_halves_as_the_file_rotates_by_pairs() -> None:
    heads, half = 3, 4
    stored = torch.randn(heads * 2 * half)
    angles = torch.rand(half)
    pairs = torch.view_as_complex(stored.view(heads, half, 2)) * torch.polar(torch.ones(half), angles)
    ours = unpermute_rows(stored[:, None], heads).view(heads, 2, half)
    rotated = torch.stack(
        [
            ours[:, 0] * angles.cos() - ours[:, 1] * angles.sin(),
            ours[:, 1] * angles.cos() + ours[:, 0] * angles.sin(),
        ],
        1,
    )
    torch.testing.assert_close(rotated[:, 0], pairs.real)
    torch.testing.assert_close(rotated[:, 1], pairs.imag)


def test_only_llama_is_permuted(tmp_path: Path) -> None:
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    path = write_gguf(tmp_path / "q.gguf", {"blk.0.attn_q.weight": rows}, arch="qwen2")
    loaded = GGUFSource(GGUFReader(path)).load("model.layers.0.self_attn.q_proj.weight")
    assert isinstance(loaded, torch.Tensor)
    assert np.array_equal(loaded.numpy(), rows)


def test_permuted_bias_and_half_types(tmp_path: Path) -> None:
    bias = np.arange(8, dtype=np.float32)
    gate = np.linspace(-1, 1, 12, dtype=np.float16).reshape(3, 4)
    up = torch.linspace(-1, 1, 12).bfloat16().view(3, 4)
    tensors = {
        "blk.0.attn_q.bias": bias,
        "blk.0.ffn_gate.weight": gate,
        "blk.0.ffn_up.weight": (up.view(torch.uint8).numpy(), "BF16"),
    }
    source = GGUFSource(GGUFReader(write_gguf(tmp_path / "m.gguf", tensors, HEADS)))
    loaded = [source.load(f"model.layers.0.{n}") for n in ("self_attn.q_proj.bias", "mlp.gate_proj.weight")]
    assert loaded[0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert loaded[1].dtype == torch.float16
    assert torch.equal(loaded[1], torch.from_numpy(gate))
    assert torch.equal(source.load("model.layers.0.mlp.up_proj.weight"), up)


def test_threads_may_load_at_once(default_reader: GGUFReader) -> None:
    source = GGUFSource(default_reader)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(8)]
    alone = [source.load(name).dequantize().sum().item() for name in names]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda name: source.load(name).dequantize().sum().item(), names)) == alone


def test_reader_does_not_import_torch() -> None:
    code = "import sys, lightllm.weights.gguf; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_small_file_round_trip(small_file: Path) -> None:
    reader = GGUFReader(small_file)
    assert reader.metadata["a.list"] == [1, 2, 3]
    assert reader.metadata["a.text"] == "caf\u00e9"
    assert reader.tensors["token_embd.weight"].shape == (6, 64)


def test_split_files_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m-00001-of-00002.gguf", {}, {"split.count": 2})
    with pytest.raises(ModelLoadError, match="gguf-split --merge"):
        GGUFReader(path)


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "blk.0.foo.weight", "cls.output.weight"])
def test_tensors_without_an_hf_name_are_refused(tmp_path: Path, name: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", {name: np.ones((2, 32), np.float32)}, HEADS)
    with pytest.raises(ModelLoadError, match=name):
        GGUFSource(GGUFReader(path))


def test_unknown_name_is_an_error(small_file: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"m\.gguf: has no tensor for lm_head\.weight"):
        GGUFSource(GGUFReader(small_file)).load("lm_head.weight")
