"""Gemma 3, the text model."""

from typing import ClassVar

import torch
from torch import Tensor

from lightllm.attention.base import AttentionBackend
from lightllm.device.forward_batch import ForwardBatch
from lightllm.layers.ops import Ops
from lightllm.layers.rotary import local_rotary_embedding
from lightllm.model_config import ModelConfig
from lightllm.models.base import VectorSpec, Weights
from lightllm.models.gemma2 import Gemma2ForCausalLM


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """As Gemma 2 without a softcap of scores, with norms of each head of q and k, a window in most layers,
    and a rotary base of their own for these.
    """

    checkpoints: ClassVar[str] = "Gemma 3 (text)"
    options: ClassVar[frozenset[str]] = frozenset(
        {
            "attention_bias",
            "sliding_window",
            "rope_local_base_freq",
            "query_pre_attn_scalar",
            "final_logit_softcapping",
        }
    )

    @classmethod
    def layer_norms(cls, config: ModelConfig) -> dict[str, VectorSpec]:
        return {
            **super().layer_norms(config),
            "q_norm": VectorSpec("self_attn.q_norm", config.head_dim),
            "k_norm": VectorSpec("self_attn.k_norm", config.head_dim),
        }

    def __init__(
        self, config: ModelConfig, weights: Weights, backend: AttentionBackend, ops: Ops, max_len: int
    ) -> None:
        super().__init__(config, weights, backend, ops, max_len)
        self.local_rotary = local_rotary_embedding(config)

    def __call__(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        x = self.embed(input_ids)  # [num_tokens, hidden_size]
        residual = torch.zeros_like(x)
        full, local = self.rotary(positions), self.local_rotary(positions)
        for i, layer in enumerate(self.layers):
            cos, sin = full if self.config.window(i) is None else local
            x = layer(x, residual, cos, sin, batch)
        return self.norm.add(x, residual)
