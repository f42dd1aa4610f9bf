"""InternLM2."""

from typing import ClassVar

import torch
from torch import Tensor

from lightllm.model_config import ModelConfig
from lightllm.models.base import LinearSpec, VectorSpec
from lightllm.models.decoder import Decoder, attention_sizes


class InternLM2ForCausalLM(Decoder):
    """As Llama under other names, with q, k and v fused in the checkpoint, by KV head."""

    checkpoints: ClassVar[str] = "InternLM2, InternLM2.5"
    options: ClassVar[frozenset[str]] = frozenset({"attention_bias"})
    embed_name: ClassVar[str] = "model.tok_embeddings"
    head_name: ClassVar[str] = "output"

    @classmethod
    def layer_linears(cls, config: ModelConfig) -> dict[str, LinearSpec]:
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size, kv_size = attention_sizes(config)
        wqkv, bias = "attention.wqkv", config.attention_bias
        return {
            "qkv": LinearSpec({wqkv: q_size + 2 * kv_size}, hidden, bias, {wqkv: qkv_order(config)}),
            "o": LinearSpec({"attention.wo": hidden}, q_size, bias),
            "gate_up": LinearSpec({"feed_forward.w1": inner, "feed_forward.w3": inner}, hidden),
            "down": LinearSpec({"feed_forward.w2": hidden}, inner),
        }

    @classmethod
    def layer_norms(cls, config: ModelConfig) -> dict[str, VectorSpec]:
        return {
            "attn_norm": VectorSpec("attention_norm", config.hidden_size),
            "mlp_norm": VectorSpec("ffn_norm", config.hidden_size),
        }


def qkv_order(config: ModelConfig) -> Tensor:
    """Order the rows of a fused weight that has, for each KV head, its q heads, then k, then v."""
    group = config.num_attention_heads // config.num_key_value_heads
    num_heads = config.num_attention_heads + 2 * config.num_key_value_heads
    rows = torch.arange(num_heads * config.head_dim).view(-1, group + 2, config.head_dim)
    return torch.cat([rows[:, :group].flatten(), rows[:, group].flatten(), rows[:, group + 1].flatten()])
