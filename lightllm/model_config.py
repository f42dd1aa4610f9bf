"""ModelConfig: the dimensions and constants of a model, from an HF config.json or from GGUF metadata.

L0: plain numbers only, shared by scheduler, frontend and models. Strict: a key that is missing or of the
wrong type is an error naming it, never a guess. Knows nothing of files, tensors or torch.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from lightllm.errors import ModelLoadError

# general.architecture of a GGUF file -> HF architecture name.
GGUF_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
)

# Tokens that end a turn in common chat templates: a model that is prompted with one also answers with it.
TURN_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")

DTYPES = ("float32", "float16", "bfloat16")


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a decoder-only language model is made of; fields are named as in HF configs.

    `rope_scaling` is None for plain rotary embeddings, else HF's dictionary with `rope_type` always set.
    `sliding_window` is None unless it is in force. `dtype` is the one the checkpoint was stored in
    ("float32" for GGUF). `eos_token_ids` are all ids that end an answer, most specific source first.
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
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: list[int] = []

    @classmethod
    def from_hf(
        cls, config_json: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Read an HF config.json (and generation_config.json, which goes first for the end tokens).

        Raises:
            ModelLoadError: a key is missing, of the wrong type or out of range.
        """
        keys = _Keys(config_json, "config.json")
        generation = _Keys(generation_config or {}, "generation_config.json")
        num_heads = keys.positive("num_attention_heads")
        hidden_size = keys.positive("hidden_size")
        theta, scaling = _hf_rope(keys)
        eos = generation.ids("eos_token_id") + keys.ids("eos_token_id")
        bos = generation.ids("bos_token_id") + keys.ids("bos_token_id")
        return cls(
            architecture=_hf_architecture(keys),
            hidden_size=hidden_size,
            intermediate_size=keys.positive("intermediate_size"),
            num_hidden_layers=keys.positive("num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=keys.positive("num_key_value_heads", num_heads),
            head_dim=keys.positive("head_dim", _default_head_dim(hidden_size, num_heads)),
            vocab_size=keys.positive("vocab_size"),
            max_position_embeddings=keys.positive("max_position_embeddings"),
            rms_norm_eps=keys.number("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
            hidden_act=keys.text("hidden_act", "silu"),
            attention_bias=keys.boolean("attention_bias", False),
            mlp_bias=keys.boolean("mlp_bias", False),
            sliding_window=_hf_sliding_window(keys),
            dtype=_hf_dtype(keys),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=list(dict.fromkeys(eos)),
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, has_lm_head: bool = False, rope_factors: Sequence[float] = ()
    ) -> "ModelConfig":
        """Read the metadata of a GGUF file.

        Args:
            metadata: key -> value, arrays as lists.
            has_lm_head: the file has a tensor `output.weight`; without one the embeddings are tied.
            rope_factors: the tensor `rope_freqs.weight` if there is one: GGUF keeps Llama 3's scaling in it.

        Raises:
            ModelLoadError: unknown architecture, or a key is missing or of the wrong type.
        """
        keys = _Keys(metadata, "GGUF metadata")
        arch = keys.text("general.architecture")
        if arch not in GGUF_ARCHITECTURES:
            known = ", ".join(sorted(GGUF_ARCHITECTURES))
            raise ModelLoadError(f"GGUF architecture {arch!r} is not supported; supported are {known}")
        if keys.optional_int(f"{arch}.expert_count"):
            raise ModelLoadError(f"GGUF files with experts ({arch}.expert_count) are not supported")
        num_heads = keys.positive(f"{arch}.attention.head_count")
        hidden_size = keys.positive(f"{arch}.embedding_length")
        head_dim = keys.positive(f"{arch}.attention.key_length", _default_head_dim(hidden_size, num_heads))
        rotary_dim = keys.positive(f"{arch}.rope.dimension_count", head_dim)
        if rotary_dim != head_dim:
            raise ModelLoadError(
                f"{arch}.rope.dimension_count: got {rotary_dim}, expected the whole head ({head_dim})"
            )
        num_tokens = len(keys.sequence("tokenizer.ggml.tokens"))
        theta, scaling = _gguf_rope(keys, arch, rope_factors)
        return cls(
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


class _Keys:
    """Typed access to a foreign dictionary; every complaint names the key and where it stands.

    JSON null counts as absent. A key without a default is required.
    """

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self.values = values
        self.origin = origin

    def _get(self, key: str, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ModelLoadError(f"{self.origin}: {key}: got {value!r:.80}, expected {expected}")
        return value

    def _choose(self, key: str, value: Any, default: Any, expected: str) -> Any:
        chosen = default if value is None else value
        if chosen is None:
            raise ModelLoadError(f"{self.origin}: key {key!r} is missing; expected {expected}")
        return chosen

    def optional_int(self, key: str) -> int | None:
        """An integer >= 0, or None."""
        value = self._get(key, (int,), "an integer >= 0")
        if value is not None and value < 0:
            raise ModelLoadError(f"{self.origin}: {key}: got {value}, expected an integer >= 0")
        return None if value is None else int(value)

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer >= 1."""
        value = int(self._choose(key, self.optional_int(key), default, "a positive integer"))
        if value < 1:
            raise ModelLoadError(f"{self.origin}: {key}: got {value}, expected a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = float(self._choose(key, self._get(key, (int, float), "a number"), default, "a number"))
        if not 0.0 < value < math.inf:
            raise ModelLoadError(f"{self.origin}: {key}: got {value}, expected a finite number above 0")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        return bool(self._choose(key, self._get(key, (bool,), "true or false"), default, "true or false"))

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return str(self._choose(key, self._get(key, (str,), "a string"), default, "a string"))

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; empty if absent."""
        return dict(self._get(key, (dict,), "an object") or {})

    def sequence(self, key: str) -> list[Any]:
        """A list; empty if absent."""
        return self._get(key, (list,), "a list") or []

    def ids(self, key: str) -> list[int]:
        """Token ids, written as one integer or as a list of them; empty if absent."""
        value = self._get(key, (int, list), "a token id or a list of them")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ModelLoadError(f"{self.origin}: {key}: got {value!r:.80}, expected token ids >= 0")
        return ids


def _default_head_dim(hidden_size: int, num_heads: int) -> int | None:
    """Head size where the model does not state it; None makes the key required."""
    return hidden_size // num_heads if hidden_size % num_heads == 0 else None


def _hf_architecture(keys: _Keys) -> str:
    names = keys.sequence("architectures")
    if not names or not isinstance(names[0], str):
        raise ModelLoadError(
            f"{keys.origin}: key 'architectures' is missing or empty; expected [\"LlamaForCausalLM\"] or so"
        )
    return names[0]


def _hf_rope(keys: _Keys) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling; newer configs hold both in `rope_parameters`, older ones in two keys."""
    parameters = keys.mapping("rope_parameters")
    scaling = parameters or keys.mapping("rope_scaling")
    theta = scaling.pop("rope_theta", None) or keys.number("rope_theta", 10000.0)
    kind = scaling.pop("type", None)
    if scaling or kind:
        scaling.setdefault("rope_type", kind or "default")
    if not isinstance(theta, int | float) or isinstance(theta, bool) or theta <= 0:
        raise ModelLoadError(f"{keys.origin}: rope_theta: got {theta!r:.80}, expected a number above 0")
    return float(theta), None if scaling.get("rope_type", "default") == "default" else scaling


def _hf_sliding_window(keys: _Keys) -> int | None:
    """The window in force: Qwen models list one in every config and switch it on with a second key."""
    window = keys.optional_int("sliding_window")
    is_used = keys.boolean("use_sliding_window", not keys.text("model_type", "").startswith("qwen"))
    return window if window and is_used else None


def _hf_dtype(keys: _Keys) -> str:
    dtype = keys.text("dtype", keys.text("torch_dtype", "float32"))
    if dtype not in DTYPES:
        raise ModelLoadError(f"{keys.origin}: dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    return dtype


def _gguf_rope(keys: _Keys, arch: str, rope_factors: Sequence[float]) -> tuple[float, dict[str, Any] | None]:
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


def _gguf_eos(keys: _Keys) -> list[int]:
    """End tokens: the stated ones, then the end-of-turn tokens that the chat template writes."""
    ids = [i for name in ("eos", "eot", "eom") for i in keys.ids(f"tokenizer.ggml.{name}_token_id")]
    template = keys.text("tokenizer.chat_template", "")
    tokens = keys.sequence("tokenizer.ggml.tokens")
    for token in TURN_END_TOKENS:
        if token in template and token in tokens:
            ids.append(tokens.index(token))
    return list(dict.fromkeys(ids))
