"""Which attention backends there are, and the choice of one at start.

A row of BACKENDS is all that a new backend needs beside its file; the conformance tests walk the table.
"""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import torch

from lightllm.attention.base import AttentionBackend
from lightllm.attention.self_check import check
from lightllm.errors import ConfigError
from lightllm.model_config import ModelConfig

# Best first; the last is the oracle of the others: never fast, always right.
BACKENDS: Mapping[str, str] = MappingProxyType(
    {
        "torch": "lightllm.attention.cpu:CpuAttention",
        "torch_ref": "lightllm.attention.torch_ref:TorchRefAttention",
    }
)
ORACLE = "torch_ref"


def select_backend(name: str, config: ModelConfig, dtype: torch.dtype) -> tuple[AttentionBackend, str]:
    """Make the backend that `name` asks for, after comparing it with the oracle on random data.

    Args:
        name: a key of BACKENDS, or `auto` for the first of them that passes.
        config: the model, for the head counts and sizes to try.
        dtype: the dtype to compute in.

    Returns:
        The backend, and the reason for it in words for the log.

    Raises:
        ConfigError: `name` is not known on this device, or fails the comparison.
    """
    if name not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise ConfigError(f"--attention_backend: got {name}, usable on a CPU are {known}")
    oracle = load_backend(ORACLE)
    failures: list[str] = []
    for candidate in BACKENDS if name == "auto" else (name,):
        if candidate == ORACLE:
            return oracle, "; ".join([*failures, "the plain formula needs no check"])
        backend = load_backend(candidate)
        problem = check(backend, oracle, config, dtype)
        if problem is None:
            return backend, "; ".join([*failures, f"agrees with {ORACLE} on random data"])
        failures.append(f"{candidate} failed its self-check: {problem}")
    raise ConfigError(f"--attention_backend: {'; '.join(failures)}; use --attention_backend auto")


def load_backend(name: str) -> AttentionBackend:
    """Import and make the backend of that key of BACKENDS."""
    module, _, attribute = BACKENDS[name].partition(":")
    return cast(AttentionBackend, getattr(importlib.import_module(module), attribute)())
