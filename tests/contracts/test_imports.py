"""The import contract, and proof that each of its rules can fail."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contracts import import_rules as rules

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightllm"
RULES = (rules.check_table, rules.check_foreign, rules.check_cuda, rules.check_cycles)

BAD = (
    (rules.check_table, "api/app.py", "import lightllm.scheduler", "imports scheduler at import time"),
    (
        rules.check_table,
        "api/app.py",
        "def f():\n    from lightllm.engine import core",
        "imports engine.core in a function",
    ),
    (rules.check_table, "engine/core.py", "from lightllm.worker import worker", "imports worker"),
    (
        rules.check_table,
        "engine/executor.py",
        "from lightllm.worker import worker",
        "imports worker.worker at import time",
    ),
    (rules.check_table, "frontend/pool.py", "from ..worker import worker", "imports worker"),
    (rules.check_table, "attention/cpu.py", "from lightllm import models", "imports models"),
    (rules.check_table, "config.py", "from lightllm.server import launch", "imports server"),
    (rules.check_table, "drawers/thing.py", "", "drawers: not in the import table"),
    (rules.check_foreign, "scheduler/slots.py", "import torch", "torch-free"),
    (rules.check_foreign, "frontend/x.py", "def f():\n    import torch.nn", "torch-free"),
    (rules.check_foreign, "scheduler/slots.py", "import asyncio", "synchronous"),
    (rules.check_foreign, "frontend/tokenizer.py", "import transformers", "only late"),
    (rules.check_foreign, "models/llama.py", "def f():\n    import transformers", "only late"),
    (rules.check_foreign, "config.py", "import starlette", "L0 has"),
    (rules.check_foreign, "kernels/rope.py", "import numpy", "kernels have"),
    (rules.check_cuda, "worker/worker.py", "import torch\ntorch.cuda.synchronize()", "uses torch.cuda"),
    (rules.check_cuda, "worker/worker.py", "from torch import cuda", "uses torch.cuda"),
    (rules.check_cycles, "engine/core.py", "from lightllm.engine import executor", "cycle"),
)

GOOD = {
    "engine/executor.py": "import lightllm.engine.core\ndef f():\n    from lightllm.worker import worker\n",
    "engine/core.py": "from lightllm.scheduler import scheduler\n",
    "engine/typed.py": "if TYPE_CHECKING:\n    from lightllm.engine import typed, core\n",
    "scheduler/scheduler.py": "from lightllm import config\nfrom . import slots\n",
    "scheduler/slots.py": "",
    "frontend/tokenizer.py": "def slow():\n    import transformers\n",
    "worker/worker.py": "import torch\nfrom lightllm.device.device import Device\n",
    "worker/cuda_graph.py": "import torch\ntorch.cuda.CUDAGraph\n",
    "device/device.py": "import torch\n",
    "models/__init__.py": "from lightllm.layers import linear\n",
    "layers/linear.py": "",
    "api/__init__.py": "",
    "attention/base.py": "",
    "kernels/ref.py": "import torch\n",
    "config.py": "import numpy\nfrom lightllm.errors import ConfigError\n",
    "errors.py": "",
}


def write_package(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_obeys(rule: Callable[[Path], list[str]]) -> None:
    assert rule(PACKAGE) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_good_code(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert rule(write_package(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("rule", "name", "text", "complaint"), BAD)
def test_rule_finds_bad_code(
    rule: Callable[[Path], list[str]], name: str, text: str, complaint: str, tmp_path: Path
) -> None:
    problems = rule(write_package(tmp_path, GOOD | {name: text}))
    assert len(problems) == 1
    assert complaint in problems[0]


# What a real start loads, asked of a real interpreter: indirect imports count too.
HEAVY = ("numpy", "starlette", "torch", "transformers", "triton", "uvicorn", "zmq")
PROBE = """
import json, runpy, sys
names, arguments = json.loads(sys.argv[1])
sys.argv = ["lightllm", *arguments]
status = 0
try:
    for name in names:
        runpy.run_module(name, run_name="__main__") if arguments else __import__(name)
except SystemExit as error:
    status = error.code or 0
sys.stderr.write("LOADED" + json.dumps([status, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def loaded_by(modules: list[str], arguments: list[str]) -> tuple[int, set[str]]:
    """Exit status, and the top-level modules that a fresh interpreter holds afterwards."""
    command = [sys.executable, "-c", PROBE, json.dumps([modules, arguments])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "LOADED" in done.stderr, done.stderr
    status, names = json.loads(done.stderr.rpartition("LOADED")[2])
    return status, set(names)


@pytest.mark.parametrize(
    "module",
    [
        "lightllm.api.app",
        "lightllm.bench.load",
        "lightllm.config",
        "lightllm.engine.core",
        "lightllm.frontend.generator",
        "lightllm.scheduler.scheduler",
        "lightllm.server.api_server",
        "lightllm.server.frontend_main",
    ],
)
def test_torch_free(module: str) -> None:
    status, names = loaded_by([module], [])
    assert status == 0
    assert not {"torch", "transformers", "triton"} & names


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("lightllm.server.api_server", ["--help"]),
        ("lightllm.server.api_server", ["--version"]),
        ("lightllm", ["--help"]),
        ("lightllm", ["serve", "--help"]),
        ("lightllm", ["bench", "--help"]),
    ],
)
def test_help_loads_nothing_heavy(module: str, arguments: list[str]) -> None:
    status, names = loaded_by([module], arguments)
    assert status == 0
    assert not set(HEAVY) & names


def test_probe_sees_heavy_modules() -> None:
    status, names = loaded_by(["numpy"], [])
    assert status == 0
    assert "numpy" in names
