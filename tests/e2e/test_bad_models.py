"""Models that cannot be loaded: exit code 3, and one line with file, tensor and what is wrong with it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightllm.model_config import ModelConfig
from lightllm.models import tensor_shapes
from lightllm.server.model_files import locate_model
from lightllm.weights.dummy import DummySource
from tests.e2e.conftest import TINY_CONFIG

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole HF model in two shards."""
    config = {**TINY_CONFIG, "vocab_size": 49152}
    model = ModelConfig.from_hf(config)
    source = DummySource(tensor_shapes(model), model.dtype)
    tensors = {name: source.load(name) for name in source.names()}
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in ("model-0.safetensors", "model-1.safetensors"):
        save_file({n: tensor for n, tensor in tensors.items() if files[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def replace(folder: Path, name: str, tensor: torch.Tensor | None) -> str:
    """Put another tensor into its shard, or take it out of shard and index; returns the shard's path."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    path = folder / index["weight_map"].pop(name)
    tensors = load_file(path)
    del tensors[name]
    if tensor is None:
        index_path.write_text(json.dumps(index))
    else:
        tensors[name] = tensor
    save_file(tensors, path)
    return str(path)


def truncated_gguf(folder: Path) -> tuple[str, str]:
    path = folder / "cut.gguf"
    shutil.copy(locate_model().path, path)
    with path.open("r+b") as file:
        file.truncate(60_000_000)
    return str(path), rf"{path}: truncated: tensor \S+ needs bytes \d+ to \d+, the file has 60000000"


def missing_shard(folder: Path) -> tuple[str, str]:
    (folder / "model-1.safetensors").unlink()
    return str(folder), rf"{folder}/model-1\.safetensors: no such file; the checkpoint is incomplete"


def truncated_shard(folder: Path) -> tuple[str, str]:
    path = folder / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return str(folder), rf"{path}: damaged or truncated safetensors file"


def missing_tensor(folder: Path) -> tuple[str, str]:
    replace(folder, DOWN, None)
    return str(folder), rf"{folder}: no safetensors file has a tensor {DOWN}"


def wrong_shape(folder: Path) -> tuple[str, str]:
    path = replace(folder, DOWN, torch.zeros(64, 127))
    return str(folder), rf"{path}: tensor {DOWN}: got shape \[64, 127\], expected \[64, 128\]"


def wrong_type(folder: Path) -> tuple[str, str]:
    path = replace(folder, DOWN, torch.zeros(64, 128, dtype=torch.int8))
    return str(folder), rf"{path}: tensor {DOWN}: got int8, expected float32, float16 or bfloat16"


def only_pickles(folder: Path) -> tuple[str, str]:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    return str(folder), r"only pickle-based weights \(pytorch_model\.bin\).*convert them to safetensors"


def wrong_config(folder: Path) -> tuple[str, str]:
    (folder / "config.json").write_text(json.dumps({**TINY_CONFIG, "num_attention_heads": "4"}))
    return str(folder), rf"{folder}/config\.json: num_attention_heads: got '4', expected an integer"


@pytest.mark.parametrize(
    "damage",
    [
        truncated_gguf,
        wrong_shape,
        pytest.param(missing_shard, marks=pytest.mark.slow),
        pytest.param(truncated_shard, marks=pytest.mark.slow),
        pytest.param(missing_tensor, marks=pytest.mark.slow),
        pytest.param(wrong_type, marks=pytest.mark.slow),
        pytest.param(only_pickles, marks=pytest.mark.slow),
        pytest.param(wrong_config, marks=pytest.mark.slow),
    ],
    ids=lambda damage: damage.__name__,
)
def test_exit_code_and_one_line(folder: Path, damage: Callable[[Path], tuple[str, str]]) -> None:
    model_dir, message = damage(folder)
    command = [sys.executable, "-m", "lightllm.server.api_server", "--model_dir", model_dir, "--port", "0"]
    done = subprocess.run(
        [*command, "--tokenizer_dir", "smollm2-135m", "--log_level", "error"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert len(re.findall(f"^.*{message}.*$", done.stderr, re.MULTILINE)) == 1, done.stderr
    assert "Traceback" not in done.stderr
