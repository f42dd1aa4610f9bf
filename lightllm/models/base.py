"""Model: the contract of every model file, and the words in which it says what weights it needs.

A model is arithmetic on tensors. It gets its weights and its attention backend as arguments, and knows
neither files nor requests nor where a sequence's KV lies. Runs in the worker.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from lightllm.attention.base import AttentionBackend
from lightllm.device.forward_batch import ForwardBatch
from lightllm.layers.linear import LinearMethod
from lightllm.layers.ops import Ops
from lightllm.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear, or several checkpoint linears on the same input, fused by putting their rows in order.

    Attributes:
        parts: checkpoint name without `.weight` -> its out_features, in the order of rows.
        in_features: columns.
        has_bias: each part has a `.bias` too.
        row_orders: of parts whose rows the checkpoint keeps in another order than layers want them: part ->
            [out_features] int64, row i of the part here is row `row_orders[part][i]` there.
        row_axes: what all rows lie along, one axis below the other, by the names of distributed/shares.py:
            where the weight is cut if several ranks share a model. Empty: every rank has all rows.
        column_axis: the same for its columns; the ranks' results are then added up.
    """

    parts: Mapping[str, int]
    in_features: int
    has_bias: bool = False
    row_orders: Mapping[str, Tensor] = field(default_factory=dict)
    row_axes: tuple[str, ...] = ()
    column_axis: str = ""

    def below(self, module: str) -> "LinearSpec":
        """Return the same with all parts named within that module."""
        return LinearSpec(
            {f"{module}.{part}": rows for part, rows in self.parts.items()},
            self.in_features,
            self.has_bias,
            {f"{module}.{part}": order for part, order in self.row_orders.items()},
            self.row_axes,
            self.column_axis,
        )


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """A one-dimensional weight, such as that of a norm.

    Attributes:
        name: in the checkpoint.
        size: number of elements.
        offset: added to what the checkpoint has. The sum is kept in float32: 1 + w with a small w loses most
            of w in bfloat16.
    """

    name: str
    size: int
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class WeightSpecs:
    """All weights of a model, each under a name that the model chose."""

    linears: Mapping[str, LinearSpec]
    vectors: Mapping[str, VectorSpec]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor of the checkpoint."""
        shapes: dict[str, tuple[int, ...]] = {}
        for linear in self.linears.values():
            for part, rows in linear.parts.items():
                shapes[f"{part}.weight"] = (rows, linear.in_features)
                if linear.has_bias:
                    shapes[f"{part}.bias"] = (rows,)
        return shapes | {vector.name: (vector.size,) for vector in self.vectors.values()}


@dataclass(frozen=True, slots=True)
class Weights:
    """What WeightSpecs asked for, under the same names, in the compute dtype (but see VectorSpec.offset)."""

    linears: Mapping[str, LinearMethod]
    vectors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Memory that the weights take."""
        linears = sum(linear.num_bytes for linear in self.linears.values())
        return linears + sum(vector.nbytes for vector in self.vectors.values())


class Model(ABC):
    """A decoder-only language model.

    Args:
        config: its dimensions.
        weights: what `weight_specs` asked for.
        backend: its attention.
        ops: everything else that its layers compute.
        max_len: of the longest sequence there will be.

    Attributes:
        checkpoints: well-known models of this architecture, for docs/models.md.
        options: the config's fields that it obeys, of those that not every architecture knows.
        num_bytes: memory that the weights take.
    """

    checkpoints: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, config: ModelConfig, weights: Weights, backend: AttentionBackend, ops: Ops, max_len: int
    ) -> None:
        self.config = config
        self.backend = backend
        self.ops = ops
        self.num_bytes = weights.num_bytes

    @classmethod
    @abstractmethod
    def check(cls, config: ModelConfig) -> None:
        """Refuse what this model does not do, before any weight is read.

        Raises:
            ModelLoadError: naming the key of the config, its value, and what is supported.
        """

    @classmethod
    @abstractmethod
    def weight_specs(cls, config: ModelConfig) -> WeightSpecs:
        """Say which weights a model of this config has. They are loaded in this order: large ones first."""

    @abstractmethod
    def __call__(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        """Compute a step's tokens and write their KV.

        Args:
            input_ids: [num_tokens] int64, in [0, vocab_size).
            positions: [num_tokens] int64, of each token in its sequence.
            batch: the step, planned by this model's backend.

        Returns:
            Hidden states after the last norm, [num_tokens, hidden_size].
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Compute scores of all tokens for the given rows of hidden states: [n, vocab_size] float32."""
