"""DummySource: seeded random weights of a model that is known by its config alone.

For benchmarks and tests at real shapes. A tensor depends on seed, name and shape only, so ranks, threads and
runs agree. Knows the tensor names of every architecture that is served.
"""

import zlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

from lightllm.errors import ModelLoadError
from lightllm.model_config import ModelConfig
from lightllm.weights.base import PackedTensor

STD = 0.02
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_GEMMA_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
# Architecture -> norms of a layer.
_NORMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "LlamaForCausalLM": _TWO_NORMS,
        "MistralForCausalLM": _TWO_NORMS,
        "Qwen2ForCausalLM": _TWO_NORMS,
        "Qwen3ForCausalLM": (*_TWO_NORMS, *_HEAD_NORMS),
        "Gemma2ForCausalLM": _GEMMA_NORMS,
        "Gemma3ForCausalLM": (*_GEMMA_NORMS, *_HEAD_NORMS),
        "Phi3ForCausalLM": _TWO_NORMS,
        "InternLM2ForCausalLM": ("attention_norm", "ffn_norm"),
        "Glm4ForCausalLM": (*_TWO_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
    }
)
_TOP_NAMES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"InternLM2ForCausalLM": ("model.tok_embeddings", "output")}
)


class DummySource:
    """A `WeightSource` of random tensors in `config.dtype`: norms one, biases zero, the rest normal.

    Raises:
        ModelLoadError: the architecture's tensor names are not known here.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.seed = seed
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self._shapes = tensor_shapes(config)

    def names(self) -> Iterable[str]:
        """HF names of all tensors."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if name not in self._shapes:
            raise ModelLoadError(f"dummy weights: the config asks for no tensor {name}")
        return self._shapes[name]

    def file(self, name: str) -> str:
        """There is none."""
        return "dummy weights"

    def load(self, name: str) -> torch.Tensor | PackedTensor:
        """Make one tensor; the same call always gives the same values."""
        shape = self.shape(name)
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self.dtype)
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self.dtype)
        # torch's CPU generator uses only 32 bits of a seed, so seed and name are mixed into these.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{name}".encode()))
        return torch.empty(shape).normal_(std=STD, generator=generator).to(self.dtype)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every tensor that a model of this config has.

    Raises:
        ModelLoadError: the architecture's names are not known.
    """
    norms = _NORMS.get(config.architecture)
    if norms is None:
        raise ModelLoadError(
            f"--load_format dummy: got architecture {config.architecture}, "
            f"expected one of {', '.join(_NORMS)}"
        )
    embed, head = _TOP_NAMES.get(config.architecture, ("model.embed_tokens", "lm_head"))
    embedding = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {f"{embed}.weight": embedding}
    for layer in range(config.num_hidden_layers):
        for name, shape in _linears(config).items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if _has_bias(config, name):
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
        for name in norms:
            size = config.head_dim if name in _HEAD_NORMS else config.hidden_size
            shapes[f"model.layers.{layer}.{name}.weight"] = (size,)
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[f"{head}.weight"] = embedding
    return shapes


def _linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Linears of a layer; which are fused differs."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    fused = (q_size + 2 * kv_size, hidden)
    if config.architecture == "InternLM2ForCausalLM":
        mlp = {f"feed_forward.{w}": (inner, hidden) for w in ("w1", "w3")}
        return {
            "attention.wqkv": fused,
            "attention.wo": (hidden, q_size),
            **mlp,
            "feed_forward.w2": (hidden, inner),
        }
    split = {f"self_attn.{p}_proj": (q_size if p == "q" else kv_size, hidden) for p in "qkv"}
    gate_up = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    is_phi3 = config.architecture == "Phi3ForCausalLM"
    if is_phi3 or config.architecture == "Glm4ForCausalLM":
        gate_up = {"mlp.gate_up_proj": (2 * inner, hidden)}
    return {
        **({"self_attn.qkv_proj": fused} if is_phi3 else split),
        "self_attn.o_proj": (hidden, q_size),
        **gate_up,
        "mlp.down_proj": (hidden, inner),
    }


def _has_bias(config: ModelConfig, name: str) -> bool:
    """Qwen2 always has biases on q, k and v, whatever its config says; GLM-4 never on o."""
    if name.startswith("mlp."):
        return config.mlp_bias
    is_output = name.endswith(("o_proj", "wo"))
    if config.architecture == "Qwen2ForCausalLM":
        return not is_output
    return config.attention_bias and not (is_output and config.architecture == "Glm4ForCausalLM")
