"""GGUFSource: the tensors of a GGUF file under their HF names, quantised ones still packed.

Owns the mapping of names and the undoing of llama.cpp's rotary permutation; the file format is `gguf`'s.
Nothing is copied except permuted rows: tensors are views of the memory map.
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

from lightllm.errors import ModelLoadError
from lightllm.weights.base import PackedTensor
from lightllm.weights.gguf import GGUFReader

_TOP_NAMES: Mapping[str, str] = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)
_LAYER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
# Not weights: divisors of rotary frequencies, which gguf_config reads.
_ROPE_FACTORS = "rope_freqs.weight"
_PLAIN_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)


class GGUFSource:
    """A `WeightSource` over an open GGUF file.

    Raises:
        ModelLoadError: the file holds a tensor that has no HF name.
    """

    def __init__(self, reader: GGUFReader) -> None:
        self.reader = reader
        self._arch = str(reader.metadata.get("general.architecture", ""))
        self._stored = {hf_name(name, reader): name for name in reader.tensors if name != _ROPE_FACTORS}

    def names(self) -> Iterable[str]:
        """HF names of all tensors, in the file's order."""
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in HF order ([out, in] for linears)."""
        return self.reader.tensors[self._find(name)].shape

    def load(self, name: str) -> torch.Tensor | PackedTensor:
        """A view of the file, packed if quantised; only q and k rows of llama are copied."""
        stored = self._find(name)
        info = self.reader.tensors[stored]
        dtype = _PLAIN_DTYPES.get(info.type)
        data = torch.frombuffer(self.reader.data(stored), dtype=dtype or torch.uint8)
        heads = self._permuted_heads(stored)
        if dtype is not None:
            plain = data.view(info.shape)
            return unpermute_rows(plain, heads) if heads else plain
        if len(info.shape) != 2:
            raise ModelLoadError(
                f"{self.reader.path}: tensor {stored}: got {info.type} {info.shape}, expected two dimensions"
            )
        rows, columns = info.shape
        data = data.view(rows, -1)
        return PackedTensor(info.type, unpermute_rows(data, heads) if heads else data, (rows, columns))

    def _find(self, name: str) -> str:
        if name not in self._stored:
            raise ModelLoadError(f"{self.reader.path}: has no tensor for {name}")
        return self._stored[name]

    def _permuted_heads(self, stored: str) -> int:
        """Number of heads whose rows llama.cpp's converter has interleaved; 0 if it has not."""
        kind = stored.split(".")[-2]
        if self._arch != "llama" or kind not in ("attn_q", "attn_k"):
            return 0
        heads = self.reader.metadata["llama.attention.head_count"]
        if kind == "attn_k":
            heads = self.reader.metadata.get("llama.attention.head_count_kv", heads)
        rows = self.reader.tensors[stored].shape[0]
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            raise ModelLoadError(
                f"{self.reader.path}: tensor {stored}: got {rows} rows, expected a multiple of 2 * {heads}"
            )
        return heads


def hf_name(name: str, reader: GGUFReader) -> str:
    """HF name of a GGUF tensor.

    Raises:
        ModelLoadError: no such tensor is known.
    """
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    module, _, part = name.rpartition(".")
    if module in _TOP_NAMES and part == "weight":
        return f"{_TOP_NAMES[module]}.weight"
    raise ModelLoadError(f"{reader.path}: tensor {name}: not part of a model of the Llama or Qwen family")


def unpermute_rows(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo the rotary interleaving of llama.cpp's converter.

    Per head the file holds rows 0, d/2, 1, d/2 + 1, ... of HF's order. Works on packed rows as well.

    Args:
        rows: [num_heads * head_dim, ...], any dtype; not modified.
    """
    half = rows.shape[0] // num_heads // 2
    return rows.view(num_heads, half, 2, -1).transpose(1, 2).reshape(rows.shape)
