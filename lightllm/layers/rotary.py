"""Rotary position embeddings, in the layout of HF models: dimension i is paired with i + head_dim / 2.

https://arxiv.org/abs/2104.09864. Angles are float32 and computed once a step, not read from a table: for some
hundred positions that costs microseconds and needs neither memory nor a limit.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightllm.errors import ModelLoadError
from lightllm.model_config import ModelConfig


class RotaryEmbedding:
    """Angles of a model's positions."""

    def __init__(self, config: ModelConfig) -> None:
        self.frequencies = rotary_frequencies(config)  # [rotary_dim / 2] float32

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin for `Ops.rotate_`, each [n, rotary_dim / 2] float32, of positions [n] int64."""
        if self.frequencies.device != positions.device:  # moved once: a copy in each step would wait for it
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, None].float() * self.frequencies
        return angles.cos(), angles.sin()


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians that each pair of dimensions turns per position: theta ** (-2 i / head_dim), then scaled.

    Raises:
        ModelLoadError: `rope_scaling` is of a type that is not built, or lacks a value.
    """
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    kind = str(scaling.get("rope_type"))
    if kind not in SCALINGS:
        known = ", ".join(sorted(SCALINGS))
        raise ModelLoadError(f"config.json: rope_scaling: got rope_type {kind!r}, supported are {known}")
    return SCALINGS[kind](frequencies, scaling)


def _linear(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Positions closer together by `factor`. https://arxiv.org/abs/2306.15595"""
    return frequencies / _value(scaling, "factor")


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Slow frequencies divided by `factor`, fast ones kept, those between blended (Llama 3.1).

    What is slow or fast is told by how many turns a frequency makes within the original context.
    """
    original = _value(scaling, "original_max_position_embeddings")
    low, high = _value(scaling, "low_freq_factor"), _value(scaling, "high_freq_factor")
    turns = frequencies * (original / (2 * math.pi))
    share_kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return torch.lerp(frequencies / _value(scaling, "factor"), frequencies, share_kept)


def _value(scaling: Mapping[str, Any], key: str) -> float:
    value = scaling.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ModelLoadError(f"config.json: rope_scaling: {key}: got {value!r}, expected a number above 0")
    return float(value)


SCALINGS: Mapping[str, Callable[[Tensor, Mapping[str, Any]], Tensor]] = MappingProxyType(
    {"linear": _linear, "llama3": _llama3}
)
