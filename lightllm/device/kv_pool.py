"""KVPool: the keys and values of all tokens, one slot a token.

Allocated once and never grown. Who uses which slot is the scheduler's business. Runs in the worker.
"""

import torch
from torch import Tensor

from lightllm.model_config import ModelConfig


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes one slot takes, over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


class KVPool:
    """Keys and values by layer and slot.

    The memory is left uninitialised, so that on a CPU the system provides a page only when a slot in it is
    first written. Slot 0 is the dummy that padding points to; it is zeroed, so that reading it is harmless.

    Args:
        config: layers, KV heads and head size.
        num_slots: slots, the dummy included.
        dtype: of keys and values.
        device: where they are.

    Attributes:
        k, v: per layer [num_slots, num_kv_heads, head_dim], contiguous.
        num_bytes: bytes reserved.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, num_slots, config.num_key_value_heads, config.head_dim)
        storage = torch.empty(2, *shape, dtype=dtype, device=device)
        storage[:, :, 0] = 0
        self.num_slots = num_slots
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_bytes = num_slots * kv_bytes_per_token(config, dtype)
        self.k: tuple[Tensor, ...] = storage[0].unbind(0)
        self.v: tuple[Tensor, ...] = storage[1].unbind(0)
