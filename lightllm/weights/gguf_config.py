"""ModelConfig from the metadata of a GGUF file. Knows no tensor library.

What the metadata leave out (llama.cpp has it in code) is in `_FAMILIES`. Keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from lightllm.config_keys import Keys
from lightllm.errors import ModelLoadError
from lightllm.model_config import FULL, MAX_LAYERS, SLIDING, ModelConfig, canonical_layers, default_head_dim

# Tensors that are no weights: divisors of rotary frequencies.
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)

# Architectures whose converter interleaves the rows of q and k, for rotation by neighbours.
PERMUTED = frozenset({"llama", "internlm2"})

# Tokens that end a turn in common chat templates: a model that is prompted with one also answers with it.
TURN_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")


class _Family(NamedTuple):
    """What is fixed for a GGUF architecture.

    `full_every` n: every n-th layer sees everything, the others a window. `wide_scale_layers`: the one size
    of model, told by its number of layers, whose scores are scaled by hidden_size / heads, not by head_dim.
    """

    architecture: str
    hidden_act: str = "silu"
    full_every: int = 0
    local_base: float | None = None
    wide_scale_layers: int = 0


_GELU = "gelu_pytorch_tanh"
# general.architecture -> family. InternLM2 computes as Llama does, and its fused weights come apart.
_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "llama": _Family("LlamaForCausalLM"),
        "qwen2": _Family("Qwen2ForCausalLM"),
        "qwen3": _Family("Qwen3ForCausalLM"),
        "gemma2": _Family("Gemma2ForCausalLM", _GELU, full_every=2, wide_scale_layers=46),
        "gemma3": _Family("Gemma3ForCausalLM", _GELU, full_every=6, local_base=1e4, wide_scale_layers=62),
        "phi3": _Family("Phi3ForCausalLM"),
        "internlm2": _Family("LlamaForCausalLM"),
        "glm4": _Family("Glm4ForCausalLM"),
    }
)


def gguf_architectures() -> dict[str, str]:
    """Return `general.architecture` -> HF architecture, for every kind of file that can be read."""
    return {name: family.architecture for name, family in _FAMILIES.items()}


def gguf_model_config(
    metadata: Mapping[str, Any],
    tensors: Collection[str] = (),
    rope_factors: Mapping[str, Sequence[float]] | None = None,
) -> ModelConfig:
    """Read the metadata of a GGUF file.

    Args:
        metadata: key -> value, arrays as lists.
        tensors: names in the file; they tell biases and whether there is a head besides the embeddings.
        rope_factors: values of those `ROPE_TENSORS` that the file has.

    Raises:
        ModelLoadError: unknown architecture, or a key is missing or of the wrong type.
    """
    plain = Keys(metadata, "GGUF metadata")
    name = plain.text("general.architecture")
    family = _FAMILIES.get(name)
    if family is None:
        raise ModelLoadError(
            f"GGUF architecture {name!r} is not supported; supported are {', '.join(sorted(_FAMILIES))}"
        )
    keys = Keys(metadata, plain.origin, f"{name}.")
    if keys.optional_int("expert_count"):
        keys.refuse("expert_count", "a model without experts")
    num_heads = keys.positive("attention.head_count")
    num_layers = keys.positive("block_count", most=MAX_LAYERS)
    hidden_size = keys.positive("embedding_length")
    head_dim = keys.positive("attention.key_length", default_head_dim(hidden_size, num_heads))
    num_tokens = len(plain.sequence("tokenizer.ggml.tokens"))
    window, layer_types = _layers(keys, family, num_layers)
    return ModelConfig(
        architecture=family.architecture,
        hidden_size=hidden_size,
        intermediate_size=keys.positive("feed_forward_length"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=keys.positive("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=num_tokens or keys.positive("vocab_size"),
        max_position_embeddings=keys.positive("context_length"),
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(keys, rope_factors or {}),
        rope_local_base_freq=keys.optional_number("rope.freq_base_swa") or family.local_base,
        partial_rotary_factor=_rotary_share(keys, name, head_dim),
        tie_word_embeddings="output.weight" not in tensors,
        hidden_act=family.hidden_act,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        sliding_window=window,
        layer_types=layer_types,
        query_pre_attn_scalar=_score_divisor(keys, family, num_layers, hidden_size / num_heads),
        attn_logit_softcapping=keys.optional_number("attn_logit_softcapping"),
        final_logit_softcapping=keys.optional_number("final_logit_softcapping"),
        bos_token_id=next(iter(plain.ids("tokenizer.ggml.bos_token_id")), None),
        eos_token_ids=_eos(plain),
    )


def _layers(keys: Keys, family: _Family, num_layers: int) -> tuple[int | None, list[str]]:
    """The window and the kinds of layers; newer files state the pattern, as a list or as one period."""
    window = keys.optional_int("attention.sliding_window") or None
    stated = keys.values.get(f"{keys.prefix}attention.sliding_window_pattern")
    if isinstance(stated, list):
        if len(stated) != num_layers:
            keys.refuse("attention.sliding_window_pattern", f"one entry for each of {num_layers} layers")
        return canonical_layers(window, [SLIDING if is_sliding else FULL for is_sliding in stated])
    period = family.full_every if stated is None else keys.positive("attention.sliding_window_pattern")
    types = [SLIDING if (i + 1) % period else FULL for i in range(num_layers)] if period else []
    return canonical_layers(window, types)


def _score_divisor(keys: Keys, family: _Family, num_layers: int, width: float) -> float | None:
    """`query_pre_attn_scalar`, from a stated scale or from what llama.cpp knows of this size of model."""
    scale = keys.optional_number("attention.scale")
    if scale is not None:
        return scale**-2
    return width if num_layers == family.wide_scale_layers else None


def _rotary_share(keys: Keys, name: str, head_dim: int) -> float:
    rotated = keys.positive("rope.dimension_count", head_dim)
    if name in PERMUTED and rotated != head_dim:
        keys.refuse("rope.dimension_count", f"the whole head ({head_dim})")
    if rotated > head_dim or rotated % 2:
        keys.refuse("rope.dimension_count", f"an even number of at most {head_dim}, the size of a head")
    return rotated / head_dim


def _rope_scaling(keys: Keys, factors: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """HF's dictionary, from keys and from the tensors that hold Llama 3's and Phi-3's scaling."""
    if ROPE_FREQS in factors:
        return _llama3_scaling(keys.number("rope.freq_base", 10000.0), factors[ROPE_FREQS])
    old = keys.optional_number("rope.scale_linear")
    kind = keys.text("rope.scaling.type", "none" if old is None else "linear")
    scaling: dict[str, Any] = {"rope_type": kind}
    if ROPE_LONG in factors and ROPE_SHORT in factors:
        scaling |= {
            "rope_type": "longrope",
            "attention_factor": keys.optional_number("rope.scaling.attn_factor"),
        }
        scaling |= {"long_factor": list(factors[ROPE_LONG]), "short_factor": list(factors[ROPE_SHORT])}
    elif kind == "none":
        return None
    elif kind in ("linear", "yarn"):
        scaling["factor"] = keys.number("rope.scaling.factor", old)
        for name in ("beta_fast", "beta_slow", "attn_factor"):
            if kind == "yarn":
                hf_name = name.replace("attn", "attention")
                scaling[hf_name] = keys.optional_number(f"rope.scaling.yarn_{name}")
    else:
        keys.refuse(
            "rope.scaling.type",
            f"none, linear, yarn, or longrope with the tensors {ROPE_LONG} and {ROPE_SHORT}",
        )
    if scaling["rope_type"] != "linear":
        original = keys.optional_int("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original or keys.positive("context_length")
    return {key: value for key, value in scaling.items() if value is not None}


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
            raise ModelLoadError(f"{ROPE_FREQS}[{i}]: got {got}, expected {expected:.6g} as in Llama 3")
    return scaling


def _eos(keys: Keys) -> list[int]:
    """End tokens: the stated ones, then the end-of-turn tokens that the chat template writes."""
    ids = [i for name in ("eos", "eot", "eom") for i in keys.ids(f"tokenizer.ggml.{name}_token_id")]
    template = keys.text("tokenizer.chat_template", "")
    tokens = keys.sequence("tokenizer.ggml.tokens")
    for token in TURN_END_TOKENS:
        if token in template and token in tokens:
            ids.append(tokens.index(token))
    return list(dict.fromkeys(ids))
