"""Decoder: what the dense models have in common, done as Llama does it; the others declare how they differ.

A subclass names its tensors, says which options of a config it obeys, and where its layers have norms. Runs
in the worker.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightllm.attention.base import AttentionBackend
from lightllm.device.forward_batch import ForwardBatch
from lightllm.distributed.shares import INNER, KV, VOCAB, Q
from lightllm.errors import ModelLoadError
from lightllm.layers.activation import check_activation
from lightllm.layers.attention import Attention
from lightllm.layers.embedding import Embedding
from lightllm.layers.mlp import GatedMLP
from lightllm.layers.norm import RMSNorm
from lightllm.layers.ops import Ops
from lightllm.layers.rotary import rotary_embedding
from lightllm.model_config import ModelConfig
from lightllm.models.base import LinearSpec, Model, VectorSpec, Weights, WeightSpecs

# What only some architectures obey: field of the config -> the value that means "not used".
OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "rope_local_base_freq": None,
        "sliding_window": None,
        "query_pre_attn_scalar": None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
)

# Linear of a layer -> the axes of its rows, and that of its columns, along which ranks share it.
AXES: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {"qkv": ((Q, KV, KV), ""), "o": ((), Q), "gate_up": ((INNER, INNER), ""), "down": ((), INNER)}
)


class DecoderLayer:
    """One layer, with norms before attention and MLP."""

    def __init__(
        self, config: ModelConfig, weights: Weights, index: int, backend: AttentionBackend, ops: Ops
    ) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(weights.vectors[f"{index}.{name}"], config.rms_norm_eps, ops)

        has_head_norms = f"{index}.q_norm" in weights.vectors
        self.attention = Attention(
            config,
            index,
            qkv=weights.linears[f"{index}.qkv"],
            o=weights.linears[f"{index}.o"],
            q_norm=norm("q_norm") if has_head_norms else None,
            k_norm=norm("k_norm") if has_head_norms else None,
            backend=backend,
            ops=ops,
        )
        self.mlp = GatedMLP(
            weights.linears[f"{index}.gate_up"], weights.linears[f"{index}.down"], config.hidden_act, ops
        )
        self.attn_norm = norm("attn_norm")
        self.mlp_norm = norm("mlp_norm")

    def __call__(self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch) -> Tensor:
        """Return what the layer adds to the residual last; what comes in is added to it in place.

        Args:
            x, residual: [num_tokens, hidden_size].
            cos, sin: [num_tokens, rotary_dim / 2] float32.
        """
        x = self.attention(self.attn_norm.add(x, residual), cos, sin, batch)
        return self.mlp(self.mlp_norm.add(x, residual))


class SandwichLayer(DecoderLayer):
    """One layer, with norms before and after attention and MLP."""

    def __init__(
        self, config: ModelConfig, weights: Weights, index: int, backend: AttentionBackend, ops: Ops
    ) -> None:
        super().__init__(config, weights, index, backend, ops)
        self.post_attn_norm = RMSNorm(weights.vectors[f"{index}.post_attn_norm"], config.rms_norm_eps, ops)
        self.post_mlp_norm = RMSNorm(weights.vectors[f"{index}.post_mlp_norm"], config.rms_norm_eps, ops)

    def __call__(self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch) -> Tensor:
        """See the base class."""
        x = self.attention(self.attn_norm.add(x, residual), cos, sin, batch)
        x = self.mlp(self.mlp_norm.add(self.post_attn_norm(x), residual))
        return self.post_mlp_norm(x)


class Decoder(Model):
    """Embedding, layers, norm, head.

    Attributes:
        layer_class: what its layers compute.
        norm_offset: added to the weights of all norms.
        embed_name, norm_name, head_name: checkpoint names of what stands outside the layers.
    """

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer
    norm_offset: ClassVar[float] = 0.0
    embed_name: ClassVar[str] = "model.embed_tokens"
    norm_name: ClassVar[str] = "model.norm"
    head_name: ClassVar[str] = "lm_head"

    @classmethod
    def layer_linears(cls, config: ModelConfig) -> dict[str, LinearSpec]:
        """Name the linears of a layer (qkv, o, gate_up, down), parts by their names within the layer."""
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size, kv_size = attention_sizes(config)
        qkv = {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size}
        return {
            "qkv": LinearSpec(qkv, hidden, config.attention_bias),
            "o": LinearSpec({"self_attn.o_proj": hidden}, q_size, config.attention_bias),
            "gate_up": LinearSpec({"mlp.gate_proj": inner, "mlp.up_proj": inner}, hidden, config.mlp_bias),
            "down": LinearSpec({"mlp.down_proj": hidden}, inner, config.mlp_bias),
        }

    @classmethod
    def layer_norms(cls, config: ModelConfig) -> dict[str, VectorSpec]:
        """Name the norms of a layer, by their names within the layer."""
        return {
            "attn_norm": VectorSpec("input_layernorm", config.hidden_size),
            "mlp_norm": VectorSpec("post_attention_layernorm", config.hidden_size),
        }

    @classmethod
    def embed_scale(cls, config: ModelConfig) -> float | None:
        """Return the factor of the embeddings; None for 1."""
        return None

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        check_activation(config.hidden_act)
        rotary_embedding(config, config.max_context_len)  # refuses what is not built
        for option, unused in OPTIONS.items():
            value = getattr(config, option)
            if option not in cls.options and value != unused:
                raise ModelLoadError(
                    f"config.json: {option}: got {value}, {cls.__name__} supports {unused} only"
                )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ModelLoadError(
                f"config.json: num_key_value_heads: got {config.num_key_value_heads}, expected a divisor of "
                f"num_attention_heads ({config.num_attention_heads})"
            )

    @classmethod
    def weight_specs(cls, config: ModelConfig) -> WeightSpecs:
        hidden, vocab = config.hidden_size, config.vocab_size
        linears = {"embed": LinearSpec({cls.embed_name: vocab}, hidden, row_axes=(VOCAB,))}
        vectors = {"norm": VectorSpec(f"{cls.norm_name}.weight", config.hidden_size, cls.norm_offset)}
        if not config.tie_word_embeddings:
            linears["lm_head"] = LinearSpec({cls.head_name: vocab}, hidden, row_axes=(VOCAB,))
        layer_linears, layer_norms = cls.layer_linears(config), cls.layer_norms(config)
        for i in range(config.num_hidden_layers):
            for name, linear in layer_linears.items():
                row_axes, column_axis = AXES[name]
                linears[f"{i}.{name}"] = replace(
                    linear.below(f"model.layers.{i}"), row_axes=row_axes, column_axis=column_axis
                )
            for name, norm in layer_norms.items():
                vectors[f"{i}.{name}"] = VectorSpec(
                    f"model.layers.{i}.{norm.name}.weight", norm.size, cls.norm_offset
                )
        return WeightSpecs(linears, vectors)

    def __init__(
        self, config: ModelConfig, weights: Weights, backend: AttentionBackend, ops: Ops, max_len: int
    ) -> None:
        super().__init__(config, weights, backend, ops, max_len)
        self.embed = Embedding(weights.linears["embed"], self.embed_scale(config))
        self.rotary = rotary_embedding(config, max_len)
        self.layers = [
            self.layer_class(config, weights, i, backend, ops) for i in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(weights.vectors["norm"], config.rms_norm_eps, ops)
        self.lm_head = weights.linears["embed" if config.tie_word_embeddings else "lm_head"]

    def __call__(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        x = self.embed(input_ids)  # [num_tokens, hidden_size]
        residual = torch.zeros_like(x)
        cos, sin = self.rotary(positions)  # each [num_tokens, rotary_dim / 2]
        for layer in self.layers:
            x = layer(x, residual, cos, sin, batch)
        return self.norm.add(x, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.lm_head(hidden).float()  # [n, vocab_size]
        cap = self.config.final_logit_softcapping
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def attention_sizes(config: ModelConfig) -> tuple[int, int]:
    """Rows of q, and of k and v each."""
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
