"""Qwen3."""

from typing import ClassVar

from lightllm.model_config import ModelConfig
from lightllm.models.base import VectorSpec
from lightllm.models.decoder import Decoder


class Qwen3ForCausalLM(Decoder):
    """As Llama, with norms of each head of q and k, and a window as in Qwen2."""

    checkpoints: ClassVar[str] = "Qwen3 dense models"
    options: ClassVar[frozenset[str]] = frozenset({"attention_bias", "sliding_window"})

    @classmethod
    def layer_norms(cls, config: ModelConfig) -> dict[str, VectorSpec]:
        return {
            **super().layer_norms(config),
            "q_norm": VectorSpec("self_attn.q_norm", config.head_dim),
            "k_norm": VectorSpec("self_attn.k_norm", config.head_dim),
        }
