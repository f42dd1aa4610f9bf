"""Two models are told apart by what their files hold; the same files elsewhere are the same model."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightllm.errors import ModelLoadError
from lightllm.server.fingerprint import model_fingerprint
from lightllm.server.model_files import describe_files, locate_model
from tests.server.test_model_files import write_hf
from tests.weights.synthetic import write_gguf

NAMES = ("a.safetensors", "b.safetensors")


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(300, 400, generator=generator) for i in range(4)}


def write_model(folder: Path, *seeds: int) -> Path:
    """A folder with two weight files, each of random numbers."""
    write_hf(folder)
    for name, seed in zip(NAMES, seeds, strict=True):
        save_file(weights(seed), folder / name)
    return folder


def fingerprint(path: Path) -> str:
    return model_fingerprint(describe_files(locate_model(str(path))))


def test_the_same_files_elsewhere_are_the_same_model(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", 1, 2)
    assert fingerprint(one) == fingerprint(Path(shutil.copytree(one, tmp_path / "two")))


def test_other_weights_under_equal_headers_are_another_model(tmp_path: Path) -> None:
    prints = {fingerprint(write_model(tmp_path / f"{a}{b}", a, b)) for a in (1, 2) for b in (1, 2)}
    assert len(prints) == 4


def test_one_tensor_in_eight_is_enough(tmp_path: Path) -> None:
    """An adapter that was merged into some of the weights."""
    one, two = write_model(tmp_path / "one", 1, 2), write_model(tmp_path / "two", 1, 2)
    tensors = weights(2)
    tensors["layer3"] += 1e-3
    save_file(tensors, two / NAMES[1])
    assert fingerprint(one) != fingerprint(two)


def test_gguf_files_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    metadata = {
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": 16,
    }
    prints = []
    for name in ("one", "two"):
        tensors = {"token_embd.weight": rng.normal(size=(16, 32)).astype(np.float32)}
        prints.append(fingerprint(write_gguf(tmp_path / f"{name}.gguf", tensors, metadata)))
    assert prints[0] != prints[1]


def test_a_model_of_ten_gigabytes_takes_no_longer_than_a_small_one(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", 1, 2)
    for name in NAMES:
        os.truncate(one / name, 5 * 10**9)  # a hole takes no room on the disk
    description = describe_files(locate_model(str(one)))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        model_fingerprint(description)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.05


def test_weights_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", 1, 2)
    description = describe_files(locate_model(str(one)))
    (one / NAMES[1]).write_bytes(b"short")
    with pytest.raises(ModelLoadError, match=r"b\.safetensors"):
        model_fingerprint(description)
