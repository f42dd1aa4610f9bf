"""Where and from what a figure was measured: command, commit, machine, versions."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def describe_run() -> dict[str, Any]:
    """Command line, commit (with `-dirty` if the tree has changes), machine and library versions."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "isa": _isa(),
            "platform": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **_versions("lightllm", "torch")},
    }


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.*)$", _cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor()


def _isa() -> list[str]:
    words = set(_cpuinfo().split())
    return [
        flag
        for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd")
        if flag in words
    ]


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "source tree"
    return found
