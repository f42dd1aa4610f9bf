"""ModelConfig from the metadata of a GGUF file. Knows no tensor library."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lightllm.config_keys import Keys
from lightllm.errors import ModelLoadError
from lightllm.model_config import ModelConfig, default_head_dim

# general.architecture of a GGUF file -> HF architecture name.
GGUF_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
)

# Tokens that end a turn in common chat templates: a model that is prompted with one also answers with it.
TURN_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")


def gguf_model_config(
    metadata: Mapping[str, Any], *, has_lm_head: bool = False, rope_factors: Sequence[float] = ()
) -> ModelConfig:
    """Read the metadata of a GGUF file.

    Args:
        metadata: key -> value, arrays as lists.
        has_lm_head: the file has a tensor `output.weight`; without one the embeddings are tied.
        rope_factors: the tensor `rope_freqs.weight` if there is one: GGUF keeps Llama 3's scaling in it.

    Raises:
        ModelLoadError: unknown architecture, or a key is missing or of the wrong type.
    """
    keys = Keys(metadata, "GGUF metadata")
    arch = keys.text("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
        known = ", ".join(sorted(GGUF_ARCHITECTURES))
        raise ModelLoadError(f"GGUF architecture {arch!r} is not supported; supported are {known}")
    if keys.optional_int(f"{arch}.expert_count"):
        raise ModelLoadError(f"GGUF files with experts ({arch}.expert_count) are not supported")
    num_heads = keys.positive(f"{arch}.attention.head_count")
    hidden_size = keys.positive(f"{arch}.embedding_length")
    head_dim = keys.positive(f"{arch}.attention.key_length", default_head_dim(hidden_size, num_heads))
    rotary_dim = keys.positive(f"{arch}.rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise ModelLoadError(
            f"{arch}.rope.dimension_count: got {rotary_dim}, expected the whole head ({head_dim})"
        )
    num_tokens = len(keys.sequence("tokenizer.ggml.tokens"))
    theta, scaling = _gguf_rope(keys, arch, rope_factors)
    return ModelConfig(
        architecture=GGUF_ARCHITECTURES[arch],
        hidden_size=hidden_size,
        intermediate_size=keys.positive(f"{arch}.feed_forward_length"),
        num_hidden_layers=keys.positive(f"{arch}.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=keys.positive(f"{arch}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=keys.positive(f"{arch}.vocab_size", num_tokens or None),
        max_position_embeddings=keys.positive(f"{arch}.context_length"),
        rms_norm_eps=keys.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=not has_lm_head,
        bos_token_id=next(iter(keys.ids("tokenizer.ggml.bos_token_id")), None),
        eos_token_ids=_gguf_eos(keys),
    )


def _gguf_rope(keys: Keys, arch: str, rope_factors: Sequence[float]) -> tuple[float, dict[str, Any] | None]:
    theta = keys.number(f"{arch}.rope.freq_base", 10000.0)
    if rope_factors:
        return theta, _llama3_scaling(theta, rope_factors)
    has_old_key = f"{arch}.rope.scale_linear" in keys.values
    kind = keys.text(f"{arch}.rope.scaling.type", "linear" if has_old_key else "none")
    if kind == "none":
        return theta, None
    if kind not in ("linear", "yarn"):
        raise ModelLoadError(f"{arch}.rope.scaling.type: got {kind!r}, expected none, linear or yarn")
    factor = keys.number(f"{arch}.rope.scaling.factor", keys.values.get(f"{arch}.rope.scale_linear"))
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = keys.optional_int(f"{arch}.rope.scaling.original_context_length")
    if kind == "yarn" and original:
        scaling["original_max_position_embeddings"] = original
    return theta, scaling


def _llama3_scaling(theta: float, factors: Sequence[float]) -> dict[str, Any]:
    """Recover Llama 3's scaling from the divisors of its frequencies; refuse any other scaling."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(max(factors)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for i, got in enumerate(factors):
        periods = 8192 / (2 * math.pi * theta ** (i / len(factors)))
        smooth = min(max((periods - 1.0) / 3.0, 0.0), 1.0)
        expected = 1 / ((1 - smooth) / max(factors) + smooth)
        if not math.isclose(got, expected, rel_tol=1e-3):
            raise ModelLoadError(f"rope_freqs.weight[{i}]: got {got}, expected {expected:.6g} as in Llama 3")
    return scaling


def _gguf_eos(keys: Keys) -> list[int]:
    """End tokens: the stated ones, then the end-of-turn tokens that the chat template writes."""
    ids = [i for name in ("eos", "eot", "eom") for i in keys.ids(f"tokenizer.ggml.{name}_token_id")]
    template = keys.text("tokenizer.chat_template", "")
    tokens = keys.sequence("tokenizer.ggml.tokens")
    for token in TURN_END_TOKENS:
        if token in template and token in tokens:
            ids.append(tokens.index(token))
    return list(dict.fromkeys(ids))
