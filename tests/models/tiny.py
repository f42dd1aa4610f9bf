"""Tiny random models of any architecture, made by transformers: config, weights and oracle in one.

InternLM2 is unknown to transformers; its oracle is a Llama, whose tensors are renamed and fused.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from lightllm.attention.registry import load_backend
from lightllm.device.forward_batch import ForwardBatch
from lightllm.device.kv_pool import KVPool
from lightllm.distributed.parallel_state import Parallel
from lightllm.errors import ModelLoadError
from lightllm.layers.native_ops import NativeOps
from lightllm.layers.ops import Ops
from lightllm.model_config import ModelConfig
from lightllm.models import load_model
from lightllm.models.base import Model
from lightllm.weights.base import PackedTensor
from lightllm.weights.gguf import BLOCK_LAYOUTS
from tests.native.available import library_or_skip

# Dimensions that every HF config understands; three query heads share a KV head.
DIMENSIONS = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 133,
    "max_position_embeddings": 512,
    "pad_token_id": 0,  # that of some classes lies beyond this vocabulary
}
STAND_INS = {"InternLM2ForCausalLM": "LlamaForCausalLM"}
INTERNLM2_NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
NUM_SLOTS = 1500
MAX_LEN = 400


class StateSource:
    """A `WeightSource` over a dictionary of tensors, packed or not."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ModelLoadError(f"tiny.safetensors: tensor {name} is missing")
        return tuple(self.tensors[name].shape)

    def file(self, name: str) -> str:
        return "tiny.safetensors"

    def load(self, name: str) -> Any:
        return self.tensors[name]

    def block_size(self, name: str) -> int:
        self.shape(name)
        tensor = self.tensors[name]
        return BLOCK_LAYOUTS[tensor.type].block_size if isinstance(tensor, PackedTensor) else 1

    def load_part(self, name: str, rows: range, columns: range | None) -> Any:
        tensor = self.tensors[name]
        if isinstance(tensor, PackedTensor):
            return tensor.part(rows, columns)
        part = tensor[rows.start : rows.stop]
        return part if columns is None else part[:, columns.start : columns.stop]


def make_oracle(architecture: str, **overrides: Any) -> transformers.PreTrainedModel:
    """Make a random HF model in float32, with weights large enough that a mistake in any of them shows."""
    model_cls = getattr(transformers, STAND_INS.get(architecture, architecture))
    torch.manual_seed(0)
    oracle = model_cls(model_cls.config_class(**{**DIMENSIONS, **overrides})).eval()
    oracle.config.architectures = [architecture]
    for name, parameter in oracle.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(std=0.1)
    return oracle


def config_of(oracle: transformers.PreTrainedModel) -> ModelConfig:
    return ModelConfig.from_hf(oracle.config.to_dict())


def source_of(oracle: transformers.PreTrainedModel) -> StateSource:
    tensors = dict(oracle.state_dict())
    if oracle.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if oracle.config.architectures == ["InternLM2ForCausalLM"]:
        tensors = as_internlm2(tensors)
    return StateSource(tensors)


def as_internlm2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Llama's tensors, and fuse q, k and v of each KV head, one after the other."""
    num_kv_heads, head_dim = DIMENSIONS["num_key_value_heads"], DIMENSIONS["head_dim"]
    group = DIMENSIONS["num_attention_heads"] // num_kv_heads
    renamed = {}
    for name, tensor in tensors.items():
        if ".self_attn." not in name or ".o_proj." in name:
            for old, new in INTERNLM2_NAMES.items():
                name = name.replace(old, new)
            renamed[name] = tensor
        elif ".q_proj." in name:
            k, v = (tensors[name.replace(".q_proj.", f".{x}_proj.")] for x in "kv")
            pieces = []
            for i in range(num_kv_heads):
                pieces.append(tensor[i * group * head_dim : (i + 1) * group * head_dim])
                pieces += [part[i * head_dim : (i + 1) * head_dim] for part in (k, v)]
            renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(pieces)
    return renamed


def load(
    config: ModelConfig,
    source: StateSource,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "torch",
    packed: bool = False,
    max_len: int | None = None,
    parallel: Parallel | None = None,
) -> Model:
    library = library_or_skip() if backend == "native" else None
    return load_model(
        config,
        source,
        dtype=dtype,
        backend=load_backend(backend, library),
        ops=Ops() if library is None else NativeOps(library),
        num_threads=2,
        progress=lambda done, total: None,
        packed=packed,
        max_len=max_len,
        parallel=parallel,
    )


class Sequences:
    """Sequences that a model computes bit by bit, as an engine would, with slots scattered in the pool."""

    def __init__(self, model: Model, token_ids: list[list[int]], dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.token_ids = token_ids
        self.num_computed = [0] * len(token_ids)
        self.on_kv_written: Callable[[int], None] | None = None
        self.pool = KVPool(model.config, NUM_SLOTS, dtype)
        slots = 1 + torch.randperm(NUM_SLOTS - 1, generator=torch.Generator().manual_seed(1))
        self.slot_table = np.zeros((len(token_ids), MAX_LEN), dtype=np.int32)
        taken = 0
        for row, ids in enumerate(token_ids):
            self.slot_table[row, : len(ids)] = slots[taken : taken + len(ids)]
            taken += len(ids)

    def step(self, counts: dict[int, int]) -> dict[int, Tensor]:
        """Compute the next `counts[row]` tokens of each row; their logits by row, [count, vocab_size]."""
        rows = np.array(list(counts))
        query_lens = np.array(list(counts.values()))
        starts = np.array([self.num_computed[row] for row in counts])
        ranges = [range(s, s + n) for s, n in zip(starts, query_lens, strict=True)]
        positions = np.concatenate(ranges)
        ids = [self.token_ids[row][i] for row, r in zip(rows, ranges, strict=True) for i in r]
        batch = ForwardBatch.build(
            rows=rows,
            seq_lens=starts + query_lens,
            query_lens=query_lens,
            positions=torch.from_numpy(positions),
            out_slots=torch.from_numpy(self.slot_table[rows.repeat(query_lens), positions].astype(np.int64)),
            slot_table=self.slot_table,
            kv_pool=self.pool,
        )
        with torch.inference_mode():
            batch.plan = self.model.backend.plan(batch)
            batch.on_kv_written = self.on_kv_written
            hidden = self.model(torch.tensor(ids), batch.positions, batch)
            logits = self.model.logits(hidden)
        for row, count in counts.items():
            self.num_computed[row] += count
        return dict(zip(counts, logits.split(query_lens.tolist()), strict=True))
