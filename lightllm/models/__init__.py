"""Models: one file each, found by the architecture that a checkpoint names.

A row of ARCHITECTURES is all that a new model needs beside its file; the tests walk the table.
"""

import importlib
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import torch

from lightllm.attention.base import AttentionBackend
from lightllm.distributed.parallel_state import Parallel
from lightllm.distributed.shares import share_out
from lightllm.errors import ModelLoadError
from lightllm.layers.ops import Ops
from lightllm.model_config import ModelConfig
from lightllm.models.base import Model, WeightSpecs
from lightllm.models.loader import Progress, column_blocks, load_weights, unused_names
from lightllm.weights.base import WeightSource

logger = logging.getLogger(__name__)

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "LlamaForCausalLM": "lightllm.models.llama:LlamaForCausalLM",
        "MistralForCausalLM": "lightllm.models.mistral:MistralForCausalLM",
        "Qwen2ForCausalLM": "lightllm.models.qwen2:Qwen2ForCausalLM",
        "Qwen3ForCausalLM": "lightllm.models.qwen3:Qwen3ForCausalLM",
        "Gemma2ForCausalLM": "lightllm.models.gemma2:Gemma2ForCausalLM",
        "Gemma3ForCausalLM": "lightllm.models.gemma3:Gemma3ForCausalLM",
        "Phi3ForCausalLM": "lightllm.models.phi3:Phi3ForCausalLM",
        "InternLM2ForCausalLM": "lightllm.models.internlm2:InternLM2ForCausalLM",
        "GlmForCausalLM": "lightllm.models.glm4:GlmForCausalLM",
        "Glm4ForCausalLM": "lightllm.models.glm4:Glm4ForCausalLM",
    }
)


def model_class(architecture: str) -> type[Model]:
    """Import the class of an architecture.

    Raises:
        ModelLoadError: there is none; the message lists those there are.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelLoadError(f"architecture {architecture} is not supported; supported are {known}")
    module, _, name = ARCHITECTURES[architecture].partition(":")
    return cast(type[Model], getattr(importlib.import_module(module), name))


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every checkpoint tensor of a model with this config.

    Raises:
        ModelLoadError: unknown architecture, or a config that it does not support.
    """
    return weight_specs(config).tensor_shapes()


def weight_specs(config: ModelConfig) -> WeightSpecs:
    """Return what a model with this config is made of.

    Raises:
        ModelLoadError: unknown architecture, or a config that it does not support.
    """
    cls = model_class(config.architecture)
    cls.check(config)
    return cls.weight_specs(config)


def load_model(
    config: ModelConfig,
    source: WeightSource,
    *,
    dtype: torch.dtype,
    backend: AttentionBackend,
    ops: Ops,
    num_threads: int,
    progress: Progress,
    device: torch.device | None = None,
    packed: bool = False,
    max_len: int | None = None,
    parallel: Parallel | None = None,
) -> Model:
    """Load a model onto a device; blocks until it can compute.

    Args:
        config: its dimensions; the tensors are checked against them.
        source: its tensors.
        dtype: to compute in.
        backend: its attention.
        ops: everything else that its layers compute.
        num_threads: that read and unpack weights at once.
        progress: called as `progress(done, total)`, counting weights.
        device: where it computes; None is the CPU.
        packed: keep quantised weights as stored: an eighth of the memory of float32, and slow in plain torch.
        max_len: of the longest sequence there will be; all that the config allows when left out.
        parallel: this rank among those that share the model; None: it is alone.

    Returns:
        The model; its `config` has the dimensions that this rank computes.

    Raises:
        ConfigError: the model cannot be spread over so many ranks.
        ModelLoadError: unknown architecture, or a tensor is missing or does not fit the config.
    """
    cls = model_class(config.architecture)
    cls.check(config)
    specs = cls.weight_specs(config)
    parallel = parallel or Parallel()
    shares = share_out(config, column_blocks(specs, source), parallel.rank, parallel.size)
    weights = load_weights(
        specs,
        source,
        dtype=dtype,
        device=device or torch.device("cpu"),
        ops=ops,
        num_threads=num_threads,
        progress=progress,
        packed=packed,
        shares=shares,
        collectives=parallel.collectives,
    )
    if unused := unused_names(specs, source):
        logger.warning("%d tensors are not used, among them %s", len(unused), ", ".join(unused[:3]))
    return cls(shares.config, weights, backend, ops, max_len or config.max_context_len)
