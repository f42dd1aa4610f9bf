"""Llama, and the models that are built like it."""

from typing import ClassVar

from lightllm.models.decoder import Decoder


class LlamaForCausalLM(Decoder):
    """Pre-norm layers, rotary positions, grouped-query attention, a gated MLP."""

    checkpoints: ClassVar[str] = "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2, TinyLlama, Yi, Vicuna"
    options: ClassVar[frozenset[str]] = frozenset({"attention_bias", "mlp_bias"})
