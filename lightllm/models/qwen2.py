"""Qwen2."""

from dataclasses import replace
from typing import ClassVar

from lightllm.model_config import ModelConfig
from lightllm.models.base import LinearSpec
from lightllm.models.decoder import Decoder


class Qwen2ForCausalLM(Decoder):
    """As Llama, with biases on q, k and v, and a sliding window in the upper layers if switched on."""

    checkpoints: ClassVar[str] = "Qwen1.5, Qwen2, Qwen2.5, QwQ"
    options: ClassVar[frozenset[str]] = frozenset({"attention_bias", "sliding_window"})

    @classmethod
    def layer_linears(cls, config: ModelConfig) -> dict[str, LinearSpec]:
        linears = super().layer_linears(config)
        linears["qkv"] = replace(linears["qkv"], has_bias=True)  # whatever the config says
        linears["o"] = replace(linears["o"], has_bias=False)
        return linears
