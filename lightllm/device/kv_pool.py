"""KVPool: the keys and values of all tokens, one slot a token.

Allocated once and never grown. Who uses which slot is the scheduler's business. Runs in the worker.
"""

import torch
from torch import Tensor

from lightllm.model_config import ModelConfig

LABEL_BYTES = 32


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
        storage: [2, num_layers, num_slots, num_kv_heads, head_dim], contiguous: keys, then values.
        k, v: its parts, per layer [num_slots, num_kv_heads, head_dim], contiguous.
        num_bytes: bytes of the storage.
        label: uint8 [LABEL_BYTES] right behind the storage, in the same memory: who reads that memory from
            another process sees by it that it is this pool's.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, num_slots, config.num_key_value_heads, config.head_dim)
        self.num_bytes = num_slots * kv_bytes_per_token(config, dtype)
        memory = torch.empty(self.num_bytes + LABEL_BYTES, dtype=torch.uint8, device=device)
        self.label = memory[self.num_bytes :]
        self.storage = memory[: self.num_bytes].view(dtype).view(2, *shape)
        self.storage[:, :, 0] = 0
        self.num_slots = num_slots
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.k: tuple[Tensor, ...] = self.storage[0].unbind(0)
        self.v: tuple[Tensor, ...] = self.storage[1].unbind(0)
