"""AttentionBackend: the contract between models and the implementations of attention over the KV pool.

Split by how often a thing happens: `plan` once a step, `forward` once a layer. Runs in the worker.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from lightllm.device.forward_batch import ForwardBatch


class AttentionBackend(ABC):
    """Causal attention of a step's new tokens over their sequences. Keeps no state between steps.

    Attributes:
        name: its public name (`--attention_backend`).
    """

    name: ClassVar[str]

    @abstractmethod
    def plan(self, batch: ForwardBatch) -> Any:
        """Work out what is the same for all layers; the caller stores it in `batch.plan`."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: int, batch: ForwardBatch) -> Tensor:
        """Write the new keys and values into the pool and attend; scores are scaled by head_dim ** -0.5.

        Args:
            q: [num_tokens, num_q_heads, head_dim], after rotary; heads [g * i, g * (i + 1)) share KV head i,
                with g = num_q_heads / num_kv_heads. May be strided.
            k, v: [num_tokens, num_kv_heads, head_dim], the dtype of the pool, k after rotary. May be strided.
            layer: index into the pool.
            batch: the step, with `plan` set.

        Returns:
            [num_tokens, num_q_heads * head_dim], the dtype of q.
        """
