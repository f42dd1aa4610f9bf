"""Gemma 2."""

from typing import ClassVar

from lightllm.model_config import ModelConfig
from lightllm.models.base import VectorSpec
from lightllm.models.decoder import Decoder, DecoderLayer, SandwichLayer


class Gemma2ForCausalLM(Decoder):
    """Norms before and after attention and MLP, their weights stored less 1; scaled embeddings, softcaps, a
    sliding window in every other layer.
    """

    checkpoints: ClassVar[str] = "Gemma 2"
    options: ClassVar[frozenset[str]] = frozenset(
        {
            "attention_bias",
            "sliding_window",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        }
    )
    layer_class: ClassVar[type[DecoderLayer]] = SandwichLayer
    norm_offset: ClassVar[float] = 1.0

    @classmethod
    def layer_norms(cls, config: ModelConfig) -> dict[str, VectorSpec]:
        return {
            "attn_norm": VectorSpec("input_layernorm", config.hidden_size),
            "post_attn_norm": VectorSpec("post_attention_layernorm", config.hidden_size),
            "mlp_norm": VectorSpec("pre_feedforward_layernorm", config.hidden_size),
            "post_mlp_norm": VectorSpec("post_feedforward_layernorm", config.hidden_size),
        }

    @classmethod
    def embed_scale(cls, config: ModelConfig) -> float | None:
        return float(config.hidden_size**0.5)
