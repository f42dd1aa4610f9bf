"""Phi-3."""

from typing import ClassVar

from lightllm.model_config import ModelConfig
from lightllm.models.base import LinearSpec
from lightllm.models.decoder import Decoder, attention_sizes


class Phi3ForCausalLM(Decoder):
    """As Llama, with q, k, v and gate, up fused in the checkpoint, and only part of a head rotated."""

    checkpoints: ClassVar[str] = "Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4 mini"
    options: ClassVar[frozenset[str]] = frozenset({"partial_rotary_factor", "sliding_window"})

    @classmethod
    def layer_linears(cls, config: ModelConfig) -> dict[str, LinearSpec]:
        q_size, kv_size = attention_sizes(config)
        return {
            **super().layer_linears(config),
            "qkv": LinearSpec({"self_attn.qkv_proj": q_size + 2 * kv_size}, config.hidden_size),
            "gate_up": LinearSpec({"mlp.gate_up_proj": 2 * config.intermediate_size}, config.hidden_size),
        }
