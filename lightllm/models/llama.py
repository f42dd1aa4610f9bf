"""Llama, and the models that are built like it (SmolLM2, TinyLlama, Yi, ...)."""

import torch
from torch import Tensor

from lightllm.attention.base import AttentionBackend, AttentionLayer
from lightllm.device.forward_batch import ForwardBatch
from lightllm.errors import ModelLoadError
from lightllm.layers.activation import check_activation, gated_activation
from lightllm.layers.embedding import Embedding
from lightllm.layers.norm import RMSNorm
from lightllm.layers.ops import Ops
from lightllm.layers.rotary import RotaryEmbedding, rotary_frequencies
from lightllm.model_config import ModelConfig
from lightllm.models.base import LinearSpec, Model, VectorSpec, Weights, WeightSpecs


class LlamaForCausalLM(Model):
    """Pre-norm decoder with rotary positions, grouped-query attention and a SiLU-gated MLP."""

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        check_activation(config.hidden_act)
        rotary_frequencies(config)  # refuses what is not built
        if config.sliding_window is not None:
            raise ModelLoadError(
                f"config.json: sliding_window: got {config.sliding_window}, {cls.__name__} supports none"
            )

    @classmethod
    def weight_specs(cls, config: ModelConfig) -> WeightSpecs:
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        linears = {"embed": LinearSpec({"model.embed_tokens": config.vocab_size}, hidden)}
        vectors = {"norm": VectorSpec("model.norm.weight", hidden)}
        if not config.tie_word_embeddings:
            linears["lm_head"] = LinearSpec({"lm_head": config.vocab_size}, hidden)
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}"
            attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
            qkv = {f"{attn}.q_proj": q_size, f"{attn}.k_proj": kv_size, f"{attn}.v_proj": kv_size}
            gate_up = {f"{mlp}.gate_proj": inner, f"{mlp}.up_proj": inner}
            linears[f"{i}.qkv"] = LinearSpec(qkv, hidden, config.attention_bias)
            linears[f"{i}.o"] = LinearSpec({f"{attn}.o_proj": hidden}, q_size, config.attention_bias)
            linears[f"{i}.gate_up"] = LinearSpec(gate_up, hidden, config.mlp_bias)
            linears[f"{i}.down"] = LinearSpec({f"{mlp}.down_proj": hidden}, inner, config.mlp_bias)
            vectors[f"{i}.attn_norm"] = VectorSpec(f"{layer}.input_layernorm.weight", hidden)
            vectors[f"{i}.mlp_norm"] = VectorSpec(f"{layer}.post_attention_layernorm.weight", hidden)
        return WeightSpecs(linears, vectors)

    def __init__(self, config: ModelConfig, weights: Weights, backend: AttentionBackend, ops: Ops) -> None:
        super().__init__(config, weights, backend, ops)
        self.embed = Embedding(weights.linears["embed"])
        self.rotary = RotaryEmbedding(config)
        self.layers = [LlamaLayer(config, weights, i, backend, ops) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(weights.vectors["norm"], config.rms_norm_eps, ops)
        self.lm_head = weights.linears["embed" if config.tie_word_embeddings else "lm_head"]

    def __call__(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        x = self.embed(input_ids)  # [num_tokens, hidden_size]
        residual = torch.zeros_like(x)
        cos, sin = self.rotary(positions)  # each [num_tokens, head_dim / 2]
        for layer in self.layers:
            x = layer(x, residual, cos, sin, batch)
        return self.norm.add(x, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).float()  # [n, vocab_size]


class LlamaLayer:
    """One decoder layer."""

    def __init__(
        self, config: ModelConfig, weights: Weights, index: int, backend: AttentionBackend, ops: Ops
    ) -> None:
        self.backend = backend
        self.ops = ops
        self.attention_layer = AttentionLayer(index, config.head_dim**-0.5)
        self.num_q_heads = config.num_attention_heads
        self.num_qk_heads = config.num_attention_heads + config.num_key_value_heads
        self.head_dim = config.head_dim
        self.activation = gated_activation(config.hidden_act, ops)
        self.attn_norm = RMSNorm(weights.vectors[f"{index}.attn_norm"], config.rms_norm_eps, ops)
        self.qkv = weights.linears[f"{index}.qkv"]
        self.o = weights.linears[f"{index}.o"]
        self.mlp_norm = RMSNorm(weights.vectors[f"{index}.mlp_norm"], config.rms_norm_eps, ops)
        self.gate_up = weights.linears[f"{index}.gate_up"]
        self.down = weights.linears[f"{index}.down"]

    def __call__(self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch) -> Tensor:
        """Return what the layer's MLP adds to the residual; what comes in is added to it in place."""
        x = self._attention(self.attn_norm.add(x, residual), cos, sin, batch)
        x = self.mlp_norm.add(x, residual)
        return self.down(self.activation(self.gate_up(x)))  # [num_tokens, hidden_size]

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch) -> Tensor:
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)  # [num_tokens, q + k + v heads, head_dim]
        self.ops.rotate_(qkv[:, : self.num_qk_heads], cos, sin)
        q, k, v = (
            qkv[:, : self.num_q_heads],
            qkv[:, self.num_q_heads : self.num_qk_heads],
            qkv[:, self.num_qk_heads :],
        )
        return self.o(self.backend.forward(q, k, v, self.attention_layer, batch))
