"""Every command, make target, route, link and Python example of the documentation is real."""

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from lightllm.api.routes import ENDPOINTS
from tests.contracts.doc_commands import (
    Command,
    blocks,
    commands,
    documents,
    inline_make_targets,
    make_targets,
    relative_links,
)

ROOT = Path(__file__).parents[2]
DOCUMENTS = documents(ROOT)
COMMANDS = [command for path in DOCUMENTS for command in commands(path)]
SERVER = ("python", "-m", "lightllm.server.api_server")
# Programs that are not ours and that a reader has or is told to install.
OTHER_PROGRAMS = frozenset(
    {
        "cd",
        "curl",
        "docker",
        "export",
        "git",
        "hf",
        "hostname",
        "kill",
        "kubectl",
        "mkdir",
        "nvidia-cuda-mps-control",
        "pip",
        "source",
    }
)


def server_arguments(command: Command) -> tuple[str, ...] | None:
    """The flags, if this command starts a server."""
    words = command.words
    if words[:3] == SERVER:
        return words[3:]
    if words[:2] == ("lightllm", "serve"):
        return words[2:]
    if words[:2] == ("make", "serve"):
        made = [word.removeprefix("ARGS=") for word in words[2:] if word.startswith("ARGS=")]
        return tuple(made[0].split()) if made else ()
    return None


def client_program(command: Command) -> str | None:
    """Which of our other programs the command starts."""
    words = command.words
    if words[:1] == ("lightllm",) and words[1] not in ("serve", "--help", "--version"):
        return words[1]
    if words[:2] in (("make", "bench"), ("make", "chat")):
        return words[1]
    return "bench" if words[:2] == ("python", "benchmark_client.py") else None


def run_ours(
    arguments: list[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightllm", *arguments]
    env = os.environ | (environment or {})
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


@cache
def dry_run(
    arguments: tuple[str, ...], environment: tuple[tuple[str, str], ...]
) -> subprocess.CompletedProcess[str]:
    """What a server command resolves to; asked once, however many documents have it."""
    return run_ours(["serve", *arguments, "--dry_run"], dict(environment))


@cache
def help_flags(program: str) -> frozenset[str]:
    done = run_ours([program, "--help"])
    assert done.returncode == 0, done.stderr
    return frozenset(re.findall(r"--[a-z][a-z0-9_]*", done.stdout))


STARTS = [command for command in COMMANDS if server_arguments(command) is not None]


@pytest.mark.parametrize("command", STARTS, ids=lambda command: command.place)
def test_server_command_resolves(command: Command) -> None:
    done = dry_run(server_arguments(command) or (), tuple(sorted(command.environment.items())))
    assert done.returncode == 0, done.stderr
    refused = json.loads(done.stdout)["not_built"]
    # A reader must not copy a command that this version refuses without having been told.
    if refused:
        name, line = command.place.split(":")
        path = next(path for path in DOCUMENTS if path.name == name)
        before = path.read_text("utf-8").splitlines()[: int(line)]
        start = max(i for i, text in enumerate(before) if text.startswith("## "))
        section = "\n".join(before[start:])
        assert re.search(r"[Nn]ot built|\u5c1a\u672a\u5b9e\u73b0", section), (
            f"{command.place}: refused: {refused}"
        )


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if client_program(c)], ids=lambda command: command.place
)
def test_client_flags_exist(command: Command) -> None:
    program = client_program(command)
    assert program in ("bench", "chat", "doctor")
    text = " ".join(word.removeprefix("ARGS=") for word in command.words)
    flags = {
        flag.replace("-", "_").replace("__", "--", 1) for flag in re.findall(r"--[a-z][a-z0-9_-]*", text)
    }
    assert (
        flags <= help_flags(program) | help_flags("serve")
        if program == "chat"
        else flags <= help_flags(program)
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(path: Path) -> None:
    named = inline_make_targets(path) | {
        word for command in commands(path) if command.words[:1] == ("make",) for word in command.words[1:2]
    }
    assert named <= make_targets(ROOT / "Makefile")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_programs_are_known(path: Path) -> None:
    ours = {"lightllm", "make", "python"}
    assert {command.words[0] for command in commands(path) if command.words} <= OTHER_PROGRAMS | ours


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_exist(path: Path) -> None:
    assert [target for target in sorted(relative_links(path)) if not (path.parent / target).exists()] == []


def missing_files(path: Path, root: Path) -> list[str]:
    """Python files that a document names (`engine/core.py`, or `core.py` for short) and that do not exist."""
    folders = (root / name for name in ("lightllm", "test", "tests", "benchmarks"))
    known = tuple(found.as_posix() for folder in folders for found in folder.rglob("*.py"))
    named = set(re.findall(r"`([a-z0-9_/]+\.py)`", path.read_text("utf-8")))
    return sorted(name for name in named if not any(have.endswith("/" + name) for have in known))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    # foo.py stands for the new file of the reader.
    assert [name for name in missing_files(path, ROOT) if not name.endswith("/foo.py")] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_examples_parse(path: Path) -> None:
    for block in blocks(path):
        if block.language == "python":
            ast.parse(block.text)
        elif block.language == "json":
            json.loads(block.text)
    for command in commands(path):
        if command.words[:1] == ("curl",) and "-d" in command.words:
            body = command.words[command.words.index("-d") + 1]
            assert isinstance(json.loads(body), dict), command.place


def curl_paths(path: Path) -> set[str]:
    return {
        re.sub(r"^https?://[^/]+", "", word) or "/"
        for command in commands(path)
        if command.words[:1] == ("curl",)
        for word in command.words[1:]
        if word.startswith("http")
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_routes_exist(path: Path) -> None:
    assert curl_paths(path) <= {endpoint.path for endpoint in ENDPOINTS}


def test_readme_starts_with_serve_and_test() -> None:
    for name in ("README.md", "README_zh.md"):
        first = [command.words for command in commands(ROOT / name)][:2]
        assert first == [("make", "serve"), ("make", "test")], name


def test_makefile_names_no_registry() -> None:
    hosts = re.compile(r"https?://(?!127\.0\.0\.1)[\w.-]+")
    for name in ("Makefile", "pyproject.toml", ".ci/run"):
        assert hosts.findall((ROOT / name).read_text("utf-8")) == [], name


# The reader of commands must itself be right, and able to find a mistake.
SAMPLE = r"""
Text with `make serve` and `make bake`, `engine/gone.py` and `engine/core.py`, [a](docs/x.md#part) and [b](https://example.org).

```bash
# a comment
A=1 B=x python -m lightllm.server.api_server --model_dir M \
    --tp 2   # trailing
cd test && python benchmark_client.py --url http://127.0.01:8000/generate_stream
make serve ARGS="--port 8001"
curl http://127.0.0.1:8000/generate -d '{
  "inputs": "What is AI?"}'
```

```console
$ hostname -i
$ lightllm serve \
$ --port 1
```

```python
x = 1
```
"""


def test_commands_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sample.md"
    path.write_text(SAMPLE)
    found = list(commands(path))
    assert [command.words[0] for command in found] == [
        "python",
        "cd",
        "python",
        "make",
        "curl",
        "hostname",
        "lightllm",
    ]
    assert found[0].environment == {"A": "1", "B": "x"}
    assert [server_arguments(command) for command in found] == [
        ("--model_dir", "M", "--tp", "2"),
        None,
        None,
        ("--port", "8001"),
        None,
        None,
        ("--port", "1"),
    ]
    assert client_program(found[2]) == "bench"
    assert json.loads(found[4].words[-1]) == {"inputs": "What is AI?"}
    assert curl_paths(path) == {"/generate"}
    assert inline_make_targets(path) == {"serve", "bake"}
    assert missing_files(path, ROOT) == ["engine/gone.py"]
    assert relative_links(path) == {"docs/x.md"}
    assert [block.language for block in blocks(path)] == ["bash", "console", "python"]


def test_wrong_flags_are_found() -> None:
    assert run_ours(["serve", "--no_such_flag", "1", "--dry_run"]).returncode == 2
    assert run_ours(["serve", "--port", "70000", "--dry_run"]).returncode == 2
    assert "--num_clients" in help_flags("bench")
    assert "--no_such_flag" not in help_flags("bench")


def test_make_targets_are_read(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("serve: x ## starts\n\techo\nhidden: y\n\techo\n")
    assert make_targets(tmp_path / "Makefile") == {"serve"}


def test_the_tour_visits_every_module() -> None:
    """But for models and kernels, which are one thing a file: docs/models.md and the folder list them."""
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+\.py", tour))
    modules = {path.relative_to(ROOT / "lightllm") for path in (ROOT / "lightllm").rglob("*.py")}
    visited = {path for path in modules if path.parts[0] not in ("models", "kernels") and path.stem[0] != "_"}
    missing = {path for path in visited if path.name not in named and f"`{path.stem}`" not in tour}
    assert missing == set()
