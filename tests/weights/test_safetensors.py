"""Safetensors folders: shards, single files, disagreement, damage."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightllm.errors import ModelLoadError
from lightllm.weights.safetensors import INDEX_NAME, SafetensorsSource

TENSORS = {f"t.{i}": torch.arange(i * 6, i * 6 + 6, dtype=torch.float32).view(2, 3) for i in range(6)}


def write_shards(folder: Path) -> None:
    files = {}
    for shard in range(3):
        file = f"model-0000{shard + 1}-of-00003.safetensors"
        part = {f"t.{i}": TENSORS[f"t.{i}"] for i in (2 * shard, 2 * shard + 1)}
        save_file(part, folder / file)
        files.update(dict.fromkeys(part, file))
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def check_all(source: SafetensorsSource) -> None:
    assert sorted(source.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert source.shape(name) == (2, 3)
        assert torch.equal(source.load(name), tensor)


def test_sharded_folder(tmp_path: Path) -> None:
    write_shards(tmp_path)
    check_all(SafetensorsSource(tmp_path))


def test_shards_without_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    check_all(SafetensorsSource(tmp_path))


def test_single_file_wins_over_others(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    check_all(SafetensorsSource(tmp_path))


def test_dtypes_are_kept(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert SafetensorsSource(tmp_path).load("a").dtype == torch.bfloat16


def test_dtypes_may_differ_between_tensors(tmp_path: Path) -> None:
    kept = {"a": torch.float16, "b": torch.bfloat16, "c": torch.float32, "d": torch.float64}
    save_file(
        {name: torch.ones(2, dtype=dtype) for name, dtype in kept.items()}, tmp_path / "model.safetensors"
    )
    source = SafetensorsSource(tmp_path)
    assert {name: source.load(name).dtype for name in kept} == kept


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32, torch.bool]
)
def test_quantised_tensors_are_refused_when_they_are_needed(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"w": torch.zeros(2).to(dtype), "norm": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    assert torch.equal(source.load("norm"), torch.ones(2))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelLoadError, match=rf"model\.safetensors: tensor w: got {name}, expected float32"):
        source.load("w")


def test_awq_and_gptq_are_refused_by_their_names(tmp_path: Path) -> None:
    save_file({"q_proj.qweight": torch.zeros(2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelLoadError, match=r"no safetensors file has a tensor q_proj\.weight, but q_proj\.qweight"
    ):
        SafetensorsSource(tmp_path).shape("q_proj.weight")


@pytest.mark.parametrize(
    ("layers", "head", "vision"),
    [
        ("language_model.model.", "language_model.lm_head.", "vision_tower."),
        ("model.language_model.", "lm_head.", "model.vision_tower."),
    ],
)
def test_only_the_language_model_of_a_multimodal_checkpoint(
    tmp_path: Path, layers: str, head: str, vision: str
) -> None:
    names = [f"{layers}norm.weight", f"{head}weight", f"{vision}blocks.0.weight", f"{vision}norm.weight"]
    save_file(
        {name: torch.full((1,), float(i)) for i, name in enumerate(names)}, tmp_path / "model.safetensors"
    )
    source = SafetensorsSource(tmp_path)
    assert sorted(source.names()) == ["lm_head.weight", "model.norm.weight"]
    assert [source.load(name).item() for name in ("model.norm.weight", "lm_head.weight")] == [0.0, 1.0]


def test_every_truncation_of_a_shard_is_an_error(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    for size in range(len(data)):
        (tmp_path / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(ModelLoadError, match=r"model\.safetensors: damaged or truncated"):
            SafetensorsSource(tmp_path)


def test_threads_may_load_at_once(tmp_path: Path) -> None:
    write_shards(tmp_path)
    source = SafetensorsSource(tmp_path)
    names = [*TENSORS] * 20
    with ThreadPoolExecutor(4) as pool:
        assert all(
            torch.equal(t, TENSORS[n]) for n, t in zip(names, pool.map(source.load, names), strict=True)
        )


def test_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"00002-of-00003\.safetensors: no such file"):
        SafetensorsSource(tmp_path)


def test_truncated_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelLoadError, match=r"00003-of-00003\.safetensors: damaged or truncated"):
        SafetensorsSource(tmp_path)


def test_index_lists_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    write_shards(tmp_path)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="tensor ghost is missing"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_bad_index(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(ModelLoadError, match=INDEX_NAME):
        SafetensorsSource(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ModelLoadError, match=r"tensor a stands in x\.safetensors too"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelLoadError, match=rf"{name}\), which are never opened"):
        SafetensorsSource(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="--load_format dummy"):
        SafetensorsSource(tmp_path)


def test_unknown_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="no safetensors file has a tensor ghost"):
        SafetensorsSource(tmp_path).load("ghost")


def test_what_has_been_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    save_file({"big.weight": torch.ones(1024, 2048)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)

    def resident_kib() -> int:
        blocks = re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
        own = [block for block in blocks if str(tmp_path) in block]
        return sum(int(size) for block in own for size in re.findall(r"^Rss: +(\d+)", block, re.MULTILINE))

    tensor = source.load("big.weight")
    assert tensor.sum() == 1024 * 2048
    assert resident_kib() > 8000
    del tensor
    assert resident_kib() < 100
