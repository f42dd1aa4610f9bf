"""GLM-4, in both of its forms."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from lightllm.model_config import ModelConfig
from lightllm.models.base import LinearSpec, VectorSpec
from lightllm.models.decoder import Decoder, DecoderLayer, SandwichLayer


class GlmForCausalLM(Decoder):
    """As Llama, with biases on q, k and v, gate and up fused in the checkpoint, and part of a head rotated,
    in pairs of neighbours.
    """

    checkpoints: ClassVar[str] = "GLM-4 9B (the -hf conversions), GLM-Edge"
    options: ClassVar[frozenset[str]] = frozenset({"attention_bias", "partial_rotary_factor"})

    @classmethod
    def layer_linears(cls, config: ModelConfig) -> dict[str, LinearSpec]:
        linears = super().layer_linears(config)
        inner = config.intermediate_size
        orders = {
            "self_attn.q_proj": halves_order(config, config.num_attention_heads),
            "self_attn.k_proj": halves_order(config, config.num_key_value_heads),
        }
        return {
            **linears,
            "qkv": replace(linears["qkv"], row_orders=orders),
            "o": replace(linears["o"], has_bias=False),
            "gate_up": LinearSpec({"mlp.gate_up_proj": 2 * inner}, config.hidden_size),
        }


class Glm4ForCausalLM(GlmForCausalLM):
    """As GLM, with norms after attention and MLP too."""

    checkpoints: ClassVar[str] = "GLM-4-0414, GLM-Z1"
    layer_class: ClassVar[type[DecoderLayer]] = SandwichLayer

    @classmethod
    def layer_norms(cls, config: ModelConfig) -> dict[str, VectorSpec]:
        return {
            "attn_norm": VectorSpec("input_layernorm", config.hidden_size),
            "post_attn_norm": VectorSpec("post_self_attn_layernorm", config.hidden_size),
            "mlp_norm": VectorSpec("post_attention_layernorm", config.hidden_size),
            "post_mlp_norm": VectorSpec("post_mlp_layernorm", config.hidden_size),
        }


def halves_order(config: ModelConfig, num_heads: int) -> Tensor:
    """Order the rows of q or k so that rotating halves rotates what the checkpoint pairs as neighbours.

    Scores do not depend on the order of a head's elements as long as q and k agree on it.
    """
    rows = torch.arange(num_heads * config.head_dim).view(num_heads, config.head_dim)
    rotated, kept = rows[:, : config.rotary_dim], rows[:, config.rotary_dim :]
    return torch.cat([rotated[:, 0::2], rotated[:, 1::2], kept], dim=1).flatten()
