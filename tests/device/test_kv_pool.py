"""The pool's layout and size."""

import resource
from pathlib import Path

import pytest
import torch

from lightllm.device.kv_pool import KVPool, kv_bytes_per_token
from lightllm.model_config import ModelConfig


def config(num_layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=576,
        intermediate_size=8,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=8,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout(dtype: torch.dtype) -> None:
    pool = KVPool(config(2), 10, dtype)
    tensors = [*pool.k, *pool.v]
    assert len(tensors) == 4
    for i, tensor in enumerate(tensors):
        assert tensor.shape == (10, 3, 64)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert not tensor[0].any()
        tensor.fill_(i)
    assert [tensor.mean().item() for tensor in tensors] == [0, 1, 2, 3]  # no two overlap
    pool.label.fill_(255)  # behind the last slot, and in nobody's
    assert [tensor.mean().item() for tensor in tensors] == [0, 1, 2, 3]
    assert pool.label.data_ptr() == pool.storage.data_ptr() + pool.num_bytes
    assert pool.num_bytes == pool.storage.nbytes == sum(tensor.nbytes for tensor in tensors)
    assert pool.num_bytes == 10 * kv_bytes_per_token(config(2), dtype)


def test_memory_is_taken_when_touched() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    pool = KVPool(config(4), 100_000, torch.float32)
    assert pool.num_bytes > 600_000_000
    assert resident_bytes() - before < 60_000_000
