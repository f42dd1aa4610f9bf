"""AttentionBackend: the contract between models and the implementations of attention over the KV pool.

Split by how often a thing happens: `plan` once a step, `forward` once a layer. Runs in the worker.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from lightllm.device.forward_batch import ForwardBatch
from lightllm.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What attention has to know of the layer it computes; fixed when the model is made.

    Attributes:
        index: of the layer in the pool.
        scale: scores are multiplied by it.
        window: a token attends to itself and the window - 1 tokens before it; None: to all before it.
        softcap: scores s become softcap * tanh(s / softcap); None: they stay.
    """

    index: int
    scale: float
    window: int | None = None
    softcap: float | None = None


class AttentionBackend(ABC):
    """Causal attention of a step's new tokens over their sequences. Keeps no state between steps.

    Attributes:
        name: its public name (`--attention_backend`).
        long_query_len: sequences with so many new tokens or more have kernels of their own; None: none have.
    """

    name: ClassVar[str]
    long_query_len: int | None = None

    @classmethod
    def for_model(cls, config: ModelConfig) -> Self:
        """Make one for a model; override it where a plan needs the model's numbers."""
        return cls()

    @abstractmethod
    def plan(self, batch: ForwardBatch) -> Any:
        """Work out what is the same for all layers; the caller stores it in `batch.plan`."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        """Write the new keys and values into the pool and attend.

        Args:
            q: [num_tokens, num_q_heads, head_dim], after rotary; heads [g * i, g * (i + 1)) share KV head i,
                with g = num_q_heads / num_kv_heads. May be strided.
            k, v: [num_tokens, num_kv_heads, head_dim], the dtype of the pool, k after rotary. May be strided.
            layer: see AttentionLayer.
            batch: the step, with `plan` set.

        Returns:
            [num_tokens, num_q_heads * head_dim], the dtype of q.
        """


class RotatingBackend(AttentionBackend):
    """A backend that can rotate the new keys on their way into the pool, and the queries beside them."""

    @abstractmethod
    def rotate_and_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor],
        layer: AttentionLayer,
        batch: ForwardBatch,
    ) -> Tensor:
        """Do what `Ops.rotate_` of q and k, and then `forward`, would do; may change q in place.

        Args:
            rotary: cosines and sines, each [num_tokens, rotary_dim / 2] float32.
        """
