"""DummySource: seeded random weights of a model that is known by its config alone.

For benchmarks and tests at real shapes. A tensor depends on seed, name and shape only, so ranks, threads and
runs agree. Knows the tensor names of the Llama family.
"""

import zlib
from collections.abc import Iterable

import torch

from lightllm.errors import ModelLoadError
from lightllm.model_config import ModelConfig
from lightllm.weights.base import PackedTensor

STD = 0.02
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


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
        ModelLoadError: the architecture is not one of the Llama family.
    """
    if config.architecture not in _ARCHITECTURES:
        raise ModelLoadError(
            f"--load_format dummy: got architecture {config.architecture}, "
            f"expected one of {', '.join(_ARCHITECTURES)}"
        )
    embedding = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": embedding}
    for layer in range(config.num_hidden_layers):
        for name, shape in _layer_shapes(config).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = embedding
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes["input_layernorm.weight"] = shapes["post_attention_layernorm.weight"] = (hidden,)
    if config.architecture == "Qwen3ForCausalLM":
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    for name, (size, _) in linears.items():
        if _has_bias(config, name):
            shapes[f"{name}.bias"] = (size,)
    return shapes


def _has_bias(config: ModelConfig, name: str) -> bool:
    """Qwen2 always has biases on q, k and v, whatever its config says."""
    if name.startswith("mlp."):
        return config.mlp_bias
    return config.attention_bias or (config.architecture == "Qwen2ForCausalLM" and "o_proj" not in name)
