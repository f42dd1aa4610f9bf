"""GGUFSource: the tensors of a GGUF file under their HF names, quantised ones still packed.

Owns the mapping of names and the undoing of what llama.cpp's converter does to weights; the file format is
`gguf`'s. Nothing is copied except permuted rows and shifted norms: tensors are views of the memory map.
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from lightllm.errors import ModelLoadError
from lightllm.weights.base import PackedTensor
from lightllm.weights.gguf import BLOCK_LAYOUTS, GGUFReader
from lightllm.weights.gguf_config import PERMUTED, ROPE_TENSORS

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
_GEMMA_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
# general.architecture -> names that differ from those above.
_OWN_NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "gemma2": _GEMMA_NAMES,
        "gemma3": _GEMMA_NAMES,
        "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        "glm4": {
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
            "ffn_up": "mlp.gate_up_proj",
        },
    }
)
# Architectures whose converter adds one to every norm.
_SHIFTED_NORMS = frozenset({"gemma2", "gemma3"})

PLAIN_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F64": torch.float64,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
    }
)


class GGUFSource:
    """A `WeightSource` over an open GGUF file.

    Raises:
        ModelLoadError: the file holds a tensor that has no HF name.
    """

    def __init__(self, reader: GGUFReader) -> None:
        self.reader = reader
        self._arch = str(reader.metadata.get("general.architecture", ""))
        self._stored = {self._hf_name(name): name for name in reader.tensors if name not in ROPE_TENSORS}

    def names(self) -> Iterable[str]:
        """HF names of all tensors, in the file's order."""
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in HF order ([out, in] for linears)."""
        return self.reader.tensors[self._find(name)].shape

    def file(self, name: str) -> str:
        """The path, and the tensor's own name."""
        return f"{self.reader.path}: {self._find(name)}"

    def block_size(self, name: str) -> int:
        """Columns in a block of its packing."""
        return BLOCK_LAYOUTS[self.reader.tensors[self._find(name)].type].block_size

    def load_part(self, name: str, rows: range, columns: range | None) -> torch.Tensor | PackedTensor:
        """A copy of some rows and columns; of permuted heads only those are read that have such rows."""
        stored = self._find(name)
        heads = self._permuted_heads(stored)
        whole = self._view(stored)
        if heads:
            height = whole.shape[0] // heads
            first, last = rows.start // height, -(-rows.stop // height)
            whole = _take(whole, range(first * height, last * height), None)
            whole = _unpermuted(whole, last - first)
            rows = range(rows.start - first * height, rows.stop - first * height)
        return _take(whole, rows, columns)

    def load(self, name: str) -> torch.Tensor | PackedTensor:
        """A view of the file, packed if quantised; permuted rows and shifted norms are copied."""
        stored = self._find(name)
        heads = self._permuted_heads(stored)
        whole = self._view(stored)
        return _unpermuted(whole, heads) if heads else whole

    def _view(self, stored: str) -> torch.Tensor | PackedTensor:
        """A tensor in the file's order of rows."""
        info = self.reader.tensors[stored]
        dtype = PLAIN_DTYPES.get(info.type)
        data = torch.frombuffer(self.reader.data(stored), dtype=dtype or torch.uint8)
        if dtype is not None:
            plain = data.view(info.shape)
            is_shifted = self._arch in _SHIFTED_NORMS and stored.endswith("norm.weight")
            return plain.float() - 1.0 if is_shifted else plain
        if len(info.shape) != 2:
            raise ModelLoadError(
                f"{self.reader.path}: tensor {stored}: got {info.type} {info.shape}, expected two dimensions"
            )
        rows, columns = info.shape
        return PackedTensor(info.type, data.view(rows, -1), (rows, columns))

    def _find(self, name: str) -> str:
        if name not in self._stored:
            raise ModelLoadError(f"{self.reader.path}: has no tensor for {name}")
        return self._stored[name]

    def _hf_name(self, name: str) -> str:
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if layer:
            own = _OWN_NAMES.get(self._arch, {})
            module = own.get(layer[2]) or _LAYER_NAMES.get(layer[2])
            if module:
                return f"model.layers.{layer[1]}.{module}.{layer[3]}"
        module, _, part = name.rpartition(".")
        if module in _TOP_NAMES and part == "weight":
            return f"{_TOP_NAMES[module]}.weight"
        raise ModelLoadError(
            f"{self.reader.path}: tensor {name}: not part of a model of architecture {self._arch!r}"
        )

    def _permuted_heads(self, stored: str) -> int:
        """Number of heads whose rows the converter has interleaved; 0 if it has not."""
        kind = stored.split(".")[-2]
        if self._arch not in PERMUTED or kind not in ("attn_q", "attn_k"):
            return 0
        metadata: Mapping[str, Any] = self.reader.metadata
        heads = metadata.get(f"{self._arch}.attention.head_count")
        if kind == "attn_k":
            heads = metadata.get(f"{self._arch}.attention.head_count_kv", heads)
        rows = self.reader.tensors[stored].shape[0]
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            raise ModelLoadError(
                f"{self.reader.path}: tensor {stored}: got {rows} rows, expected a multiple of 2 * {heads}"
            )
        return heads


def _take(
    tensor: torch.Tensor | PackedTensor, rows: range, columns: range | None
) -> torch.Tensor | PackedTensor:
    if isinstance(tensor, PackedTensor):
        return tensor.part(rows, range(tensor.shape[1]) if columns is None else columns)
    part = tensor[rows.start : rows.stop]
    return part if columns is None else part[:, columns.start : columns.stop]


def _unpermuted(tensor: torch.Tensor | PackedTensor, num_heads: int) -> torch.Tensor | PackedTensor:
    if isinstance(tensor, PackedTensor):
        return PackedTensor(tensor.type, unpermute_rows(tensor.data, num_heads), tensor.shape)
    return unpermute_rows(tensor, num_heads)


def unpermute_rows(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo the rotary interleaving of llama.cpp's converter.

    Per head the file holds rows 0, d/2, 1, d/2 + 1, ... of HF's order. Works on packed rows as well.

    Args:
        rows: [num_heads * head_dim, ...], any dtype; not modified.
    """
    half = rows.shape[0] // num_heads // 2
    return rows.view(num_heads, half, 2, -1).transpose(1, 2).reshape(rows.shape)
