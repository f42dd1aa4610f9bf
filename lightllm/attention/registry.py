"""Which attention backends there are, and the choice of one at start.

A row of BACKENDS is all that a new backend needs beside its file; the conformance tests walk the table.
"""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import torch

from lightllm.attention.base import AttentionBackend
from lightllm.attention.flashinfer_kernels import load_kernels
from lightllm.attention.native import NativeAttention
from lightllm.attention.self_check import check
from lightllm.errors import ConfigError
from lightllm.model_config import ModelConfig
from lightllm.native.library import MAX_GROUP, MAX_HEAD_DIM, PANEL, NativeLibrary

# Best first; the last is the oracle of the others: never fast, always right.
BACKENDS: Mapping[str, str] = MappingProxyType(
    {
        "native": "lightllm.attention.native:NativeAttention",
        "torch": "lightllm.attention.cpu:CpuAttention",
        "torch_ref": "lightllm.attention.torch_ref:TorchRefAttention",
    }
)
ORACLE = "torch_ref"
# The same for GPUs; the oracle of these computes on the CPU.
CUDA_BACKENDS: Mapping[str, str] = MappingProxyType(
    {
        "flashinfer": "lightllm.attention.flashinfer_prefill:FlashInferAttention",
        "triton": "lightllm.attention.triton_gqa:TritonAttention",
    }
)


def select_cuda_backend(
    name: str, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[AttentionBackend, str]:
    """As `select_backend`, on a GPU, where no backend is trusted without having passed.

    `auto` compiles none of FlashInfer's kernels, so that a start does not take minutes unasked.

    Raises:
        ConfigError: `name` is not known on a GPU, or none passes the comparison.
    """
    if name not in ("auto", *CUDA_BACKENDS):
        known = ", ".join(("auto", *CUDA_BACKENDS))
        raise ConfigError(f"--attention_backend: got {name}, usable on a GPU are {known}")
    failures: list[str] = []
    for candidate in CUDA_BACKENDS if name == "auto" else (name,):
        if candidate == "flashinfer":
            problem = load_kernels(config, dtype, device, may_compile=name == candidate)
            if problem is not None:
                failures.append(problem)
                continue
        backend = load_backend(candidate, config=config)
        problem = check(backend, load_backend(ORACLE), config, dtype, device)
        if problem is None:
            return backend, "; ".join([*failures, f"agrees with {ORACLE} on random data"])
        failures.append(f"{candidate} failed its self-check: {problem}")
    remedy = "--attention_backend triton" if name == "flashinfer" else "--device cpu"
    raise ConfigError(f"--attention_backend: {'; '.join(failures)}; use {remedy}")


def select_backend(
    name: str, config: ModelConfig, dtype: torch.dtype, library: NativeLibrary | None = None
) -> tuple[AttentionBackend, str]:
    """Make the backend that `name` asks for, after comparing it with the oracle on random data.

    Args:
        name: a key of BACKENDS, or `auto` for the first of them that passes.
        config: the model, for the head counts and sizes to try.
        dtype: the dtype to compute in.
        library: the C kernels, if there are any.

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
        if candidate == "native" and (problem := _native_problem(config, dtype, library)):
            if library is not None or name == candidate:  # the worker has said why there is no library
                failures.append(problem)
            continue
        backend = load_backend(candidate, library)
        problem = check(backend, oracle, config, dtype)
        if problem is None:
            return backend, "; ".join([*failures, f"agrees with {ORACLE} on random data"])
        failures.append(f"{candidate} failed its self-check: {problem}")
    raise ConfigError(f"--attention_backend: {'; '.join(failures)}; use --attention_backend auto")


def load_backend(
    name: str, library: NativeLibrary | None = None, config: ModelConfig | None = None
) -> AttentionBackend:
    """Import and make a backend: `native` needs the library, those of CUDA_BACKENDS the model."""
    module, _, attribute = {**CUDA_BACKENDS, **BACKENDS}[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    if config is not None:
        return cast(AttentionBackend, cls.for_model(config))
    return cast(AttentionBackend, cls(library) if name == "native" else cls())


def _native_problem(config: ModelConfig, dtype: torch.dtype, library: NativeLibrary | None) -> str | None:
    if library is None:
        return "native: the C kernels are not in use"
    group = config.num_attention_heads // config.num_key_value_heads
    if not NativeAttention.supports(dtype, config.head_dim, group):
        return (
            f"native: computes float32, heads of up to {MAX_HEAD_DIM} in steps of {PANEL} and up to "
            f"{MAX_GROUP} query heads per KV head; this model has {dtype}, {config.head_dim} and {group}"
        )
    return None
