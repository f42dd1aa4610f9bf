"""Hub ids against a hub on loopback and a real cache; each in a process of its own, as the library reads the
environment when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.hub_stub import COMMIT, Hub, hub

FILES = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "model-1.safetensors": b"x" * 1000,
    "model-2.safetensors": b"y" * 1000,
    "model.safetensors.index.json": (
        b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    ),
    "consolidated.safetensors": b"z",
    "onnx/model.safetensors": b"z",
    "modeling_own.py": b"raise SystemExit",
    "pytorch_model.bin": b"z",
    "README.md": b"z",
}
CONFIGURATION = ["chat_template.jinja", "config.json", "generation_config.json"]
CONFIGURATION += ["model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
WEIGHTS = ["model-1.safetensors", "model-2.safetensors"]
NO_MODEL = "error: --model_dir: org/name: no such path here; as a hub model: not wholly in the local cache"
LOCATE = """
import json, sys
from lightllm.errors import ModelLoadError
from lightllm.server import model_files
try:
    name, arguments, options = map(json.loads, sys.argv[1:])
    found = getattr(model_files, name)(*arguments, **options)
    print(found.kind, found.name, found.path)
except ModelLoadError as error:
    print(f"error: {error}")
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def locate(
    cache: Path,
    server: Hub | None,
    *arguments: str,
    function: str = "locate_model",
    options: dict[str, object] | None = None,
    **env: str,
) -> str:
    """What a fresh process says of the model org/name: kind, name and folder, or its error."""
    endpoint = server.url if server else "http://127.0.0.1:9"
    call = [json.dumps(part) for part in (function, ["org/name", *arguments], options or {})]
    done = subprocess.run(
        [sys.executable, "-c", LOCATE, *call],
        env={**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", **env},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return line


def fetched(cache: Path) -> list[str]:
    folder = cache / "hub/models--org--name/snapshots" / COMMIT
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_only_what_is_needed_is_downloaded_and_then_kept(cache: Path) -> None:
    with hub("org/name", FILES) as server:
        line = locate(cache, server)
    assert line == f"hf name {cache}/hub/models--org--name/snapshots/{COMMIT}"
    assert fetched(cache) == sorted([*CONFIGURATION, *WEIGHTS])
    assert not any(name in "".join(server.asked) for name in (".py", ".bin", "onnx", "consolidated"))
    with hub("org/name", FILES) as server:
        assert locate(cache, server) == line
        assert server.asked == []
    assert locate(cache, None, HF_HUB_OFFLINE="1") == line


def test_dummy_weights_and_tokenizers_need_no_weights(cache: Path) -> None:
    with hub("org/name", FILES) as server:
        assert locate(cache, server, "dummy").startswith("hf name ")
        assert locate(cache, server, function="locate_tokenizer").startswith("hf name ")
    assert fetched(cache) == CONFIGURATION
    bare = {name: data for name, data in FILES.items() if name.startswith("tokenizer")}
    with hub("org/name", bare) as server:
        elsewhere = cache.with_name("elsewhere")
        assert locate(elsewhere, server, function="locate_tokenizer").startswith("hf name ")
        assert "the hub model has no config.json" in locate(elsewhere, server)


def test_half_a_cached_model_is_completed(cache: Path) -> None:
    with hub("org/name", FILES) as server:
        locate(cache, server, "dummy")
        assert "not wholly in the local cache" in locate(cache, None, HF_HUB_OFFLINE="1")
        assert locate(cache, server).startswith("hf name ")
    assert fetched(cache) == sorted([*CONFIGURATION, *WEIGHTS])


@pytest.mark.parametrize("index", [b"{}", b'{"weight_map": ["a"]}', b'{"weight_map": {"a": 1}}'])
def test_a_cached_index_that_says_nothing_is_not_whole(cache: Path, index: bytes) -> None:
    with hub("org/name", {**FILES, "model.safetensors.index.json": index}) as server:
        locate(cache, server)
    assert "not wholly in the local cache" in locate(cache, None, options={"allow_download": False})


@pytest.mark.parametrize(
    ("fault", "cause"), [("gated", "401 Client Error. Cannot access gated repo"), ("cut", "peer closed")]
)
def test_a_failed_download_is_one_line(cache: Path, fault: str, cause: str) -> None:
    # One file: the library tries each of them five times.
    files = {"config.json": b"{}", "model.safetensors": b"x" * 1000}
    with hub("org/name", files, fault) as server:
        line = locate(cache, server)
    assert line.startswith(f"{NO_MODEL}, and download failed ({cause}")
    assert line.endswith("; download it elsewhere and pass its folder")


@pytest.mark.parametrize(
    ("env", "cause"), [({}, "Connection refused"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE=0")]
)
def test_without_a_network(cache: Path, env: dict[str, str], cause: str) -> None:
    line = locate(cache, None, **env)
    assert line.startswith(NO_MODEL)
    assert cause in line


def test_download_may_be_forbidden(cache: Path) -> None:
    with hub("org/name", FILES) as server:
        line = locate(cache, server, options={"allow_download": False})
        assert line == NO_MODEL
        assert server.asked == []


def test_a_server_starts_no_further_without_the_model(cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightllm.server.api_server", "--model_dir", "org/name", "--port", "0"],
        env={**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith(NO_MODEL)
