"""ModelConfig: the dimensions and constants of a model, read from an HF config.json.

L0: plain numbers only, shared by scheduler, frontend and models. Strict: a key that is missing or of the
wrong type is an error naming it, never a guess. Knows nothing of files, tensors or torch; GGUF metadata are
read by weights/gguf_config.py.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from lightllm.config_keys import Keys
from lightllm.errors import ModelLoadError

DTYPES = ("float32", "float16", "bfloat16")
MAX_LAYERS = 1024
FULL, SLIDING = "full_attention", "sliding_attention"

# Multimodal architecture -> the language model in it, which is all that is served.
TEXT_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
)

# Keys that checkpoints leave out because they equal the default of the model's class in transformers.
_GEMMA: Mapping[str, Any] = MappingProxyType(
    {
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    }
)
_HF_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "MistralForCausalLM": {"sliding_window": 4096},
        "Gemma2ForCausalLM": {
            **_GEMMA,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        "Gemma3ForCausalLM": {
            **_GEMMA,
            "max_position_embeddings": 131072,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1e6,
            "sliding_window_pattern": 6,
            "vocab_size": 262208,
        },
        "GlmForCausalLM": {"attention_bias": True, "partial_rotary_factor": 0.5},
        "Glm4ForCausalLM": {"attention_bias": True, "partial_rotary_factor": 0.5},
    }
)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a decoder-only language model is made of; fields are named as in HF configs.

    Attributes:
        architecture: HF class name; of a multimodal model, that of its language model.
        rope_scaling: None for plain rotary embeddings, else HF's dictionary with `rope_type` always set
            (linear, dynamic, yarn, llama3, longrope), and `original_max_position_embeddings` where it counts
            (the last three). Layers with a sliding window and a base of their own
            (`rope_local_base_freq`) are never scaled.
        rope_local_base_freq: rotary base of sliding layers, where it differs from `rope_theta` (Gemma 3).
        partial_rotary_factor: share of a head that is rotated (see `rotary_dim`); the rest stays as it is.
        attention_bias: q, k and v have biases. What else has one is the architecture's matter: o_proj of
            Llama has, that of GLM-4 has not; Qwen2 has them on q, k and v whatever this says.
        sliding_window: a token sees this many, itself included; None unless some layer is so bounded.
        layer_types: `full_attention` or `sliding_attention` for each layer; empty if all layers are alike,
            and then all slide if there is a window. Use `window(layer)`.
        query_pre_attn_scalar: attention scores are divided by its square root (Gemma); None means head_dim.
        attn_logit_softcapping: attention scores s become c * tanh(s / c); None for no cap.
        final_logit_softcapping: the same for the logits.
        dtype: the one the checkpoint was stored in ("float32" for GGUF).
        eos_token_ids: all ids that end an answer, most specific source first.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_local_base_freq: float | None = None
    partial_rotary_factor: float = 1.0
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] = []
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: list[int] = []

    @property
    def rotary_dim(self) -> int:
        """Leading elements of a head that are rotated."""
        # The share may be a quotient: 49 * (1 / 49) is a little less than 1.
        return int(self.head_dim * self.partial_rotary_factor + 1e-9)

    @property
    def max_context_len(self) -> int:
        """Tokens a sequence may have: `max_position_embeddings`, or what rotary scaling stretches it to.

        Raises:
            ModelLoadError: `rope_scaling` lacks a value.
        """
        keys = Keys(self.rope_scaling or {}, "config.json: rope_scaling")
        kind, trained = keys.text("rope_type", "default"), self.max_position_embeddings
        # Gemma 3 states the stretched length; others with these two types the trained one.
        if kind in ("linear", "dynamic") and self.architecture != "Gemma3ForCausalLM":
            return max(trained, int(trained * keys.number("factor")))
        if kind == "yarn":
            original = keys.positive("original_max_position_embeddings", trained)
            return max(trained, int(original * keys.number("factor", 1.0)))
        return trained

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied with."""
        return 1.0 / math.sqrt(self.query_pre_attn_scalar or self.head_dim)

    def window(self, layer: int) -> int | None:
        """Tokens that a token of this layer sees, itself included; None for all before it."""
        is_full = bool(self.layer_types) and self.layer_types[layer] == FULL
        return None if is_full else self.sliding_window

    @classmethod
    def from_hf(
        cls, config_json: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Read an HF config.json (and generation_config.json, which goes first for the end tokens).

        Raises:
            ModelLoadError: a key is missing, of the wrong type or out of range.
        """
        architecture, keys = _hf_keys(config_json)
        top = Keys(config_json, "config.json")
        generation = Keys(generation_config or {}, "generation_config.json")
        num_heads = keys.positive("num_attention_heads")
        hidden_size = keys.positive("hidden_size")
        num_layers = keys.positive("num_hidden_layers", most=MAX_LAYERS)
        window, layer_types = _hf_layers(keys, num_layers)
        eos = [i for source in (generation, top, keys) for i in source.ids("eos_token_id")]
        bos = generation.ids("bos_token_id") + keys.ids("bos_token_id")
        return cls(
            architecture=architecture,
            hidden_size=hidden_size,
            intermediate_size=keys.positive("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=keys.positive("num_key_value_heads", num_heads),
            head_dim=keys.positive("head_dim", default_head_dim(hidden_size, num_heads)),
            vocab_size=keys.positive("vocab_size"),
            max_position_embeddings=keys.positive("max_position_embeddings"),
            rms_norm_eps=keys.number("rms_norm_eps"),
            **_hf_rope(keys),
            tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
            hidden_act=keys.text("hidden_activation", keys.text("hidden_act", "silu")),
            attention_bias=keys.boolean("attention_bias", keys.boolean("bias", False)),
            mlp_bias=keys.boolean("mlp_bias", False),
            sliding_window=window,
            layer_types=layer_types,
            query_pre_attn_scalar=keys.optional_number("query_pre_attn_scalar"),
            attn_logit_softcapping=keys.optional_number("attn_logit_softcapping"),
            final_logit_softcapping=keys.optional_number("final_logit_softcapping"),
            dtype=_hf_dtype(keys),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=list(dict.fromkeys(eos)),
        )


def default_head_dim(hidden_size: int, num_heads: int) -> int | None:
    """Head size where the model does not state it; None makes the key required."""
    return hidden_size // num_heads if hidden_size % num_heads == 0 else None


def canonical_layers(window: int | None, layer_types: list[str]) -> tuple[int | None, list[str]]:
    """`sliding_window` and `layer_types` as ModelConfig wants them: no list where all layers are alike."""
    if window is None or (layer_types and SLIDING not in layer_types):
        return None, []
    return window, layer_types if FULL in layer_types else []


def _hf_keys(config_json: Mapping[str, Any]) -> tuple[str, Keys]:
    """The architecture, and the keys of its language model above the defaults of its class."""
    names = Keys(config_json, "config.json").sequence("architectures")
    if not names or not isinstance(names[0], str):
        raise ModelLoadError(
            "config.json: key 'architectures' is missing or empty; expected [\"LlamaForCausalLM\"] or so"
        )
    nested = Keys(config_json, "config.json").mapping("text_config")
    architecture = TEXT_ARCHITECTURES.get(names[0], names[0])
    # A null of the nested object says nothing; one at the top replaces the default.
    stated = {**config_json, **{key: value for key, value in nested.items() if value is not None}}
    return architecture, Keys({**_HF_DEFAULTS.get(architecture, {}), **stated}, "config.json")


def _hf_rope(keys: Keys) -> dict[str, Any]:
    """Rotary fields; newer configs hold all in `rope_parameters`, older ones in keys of their own."""
    parameters = keys.mapping("rope_parameters")
    local = keys.optional_number("rope_local_base_freq")
    if "full_attention" in parameters:  # one object for each kind of layer
        kinds = Keys(parameters, "config.json: rope_parameters")
        parameters, sliding = kinds.mapping(FULL), Keys(kinds.mapping(SLIDING), kinds.origin)
        if sliding.text("rope_type", "default") != "default":
            raise ModelLoadError(
                f"{kinds.origin}: {SLIDING}: got rope_type {sliding.values['rope_type']!r}, expected default"
            )
        local = sliding.number("rope_theta", local or keys.number("rope_theta", 10000.0))
    scaling = parameters or keys.mapping("rope_scaling")
    inner = Keys(scaling, keys.origin)
    theta = inner.number("rope_theta", keys.number("rope_theta", 10000.0))
    share = inner.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0))
    kind = inner.text("rope_type", inner.text("type", "default"))
    kept = {k: v for k, v in scaling.items() if k not in ("rope_theta", "partial_rotary_factor", "type")}
    if kind == "su" or "long_factor" in kept:  # the names that Phi-3 had for it at first
        kind = "longrope"
    if kind in ("llama3", "yarn", "longrope"):
        # As in transformers: Phi-3's key outside goes first.
        default = keys.positive("max_position_embeddings")
        default = inner.positive("original_max_position_embeddings", default)
        original = keys.positive("original_max_position_embeddings", default)
        kept["original_max_position_embeddings"] = original
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {**kept, "rope_type": kind},
        "rope_local_base_freq": local,
        "partial_rotary_factor": share,
    }


def _hf_layers(keys: Keys, num_layers: int) -> tuple[int | None, list[str]]:
    """The window in force and the kinds of layers.

    Qwen models list a window in every config, switch it on with a second key, and bound only the layers from
    `max_window_layers` on; Gemma bounds all but every n-th layer.
    """
    window = keys.optional_int("sliding_window")
    is_qwen = keys.text("model_type", "").startswith("qwen")
    if not window or not keys.boolean("use_sliding_window", not is_qwen):
        return None, []
    types = keys.sequence("layer_types")[:num_layers]
    pattern = keys.optional_int("sliding_window_pattern") or keys.optional_int("_sliding_window_pattern")
    if not types and pattern:
        types = [SLIDING if (i + 1) % pattern else FULL for i in range(num_layers)]
    elif not types and is_qwen:
        first = keys.optional_int("max_window_layers")
        first = 28 if first is None else first  # the class's default
        types = [SLIDING if i >= first else FULL for i in range(num_layers)]
    if types and (len(types) < num_layers or not {*types} <= {SLIDING, FULL}):
        raise ModelLoadError(
            f"{keys.origin}: layer_types: got {types!r:.80}, expected {SLIDING} or {FULL} for each of "
            f"{num_layers} layers"
        )
    return canonical_layers(window, types)


def _hf_dtype(keys: Keys) -> str:
    dtype = keys.text("dtype", keys.text("torch_dtype", "float32"))
    if dtype not in DTYPES:
        raise ModelLoadError(f"{keys.origin}: dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    return dtype
