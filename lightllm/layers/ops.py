"""Ops: the operations that layers are made of, as one device computes them.

A model gets its Ops as an argument, and hands it to its layers. This class is the plain version, right on
every device and the oracle of its subclasses, which replace methods by fused kernels and say in `name` what
they are. Stateless as far as callers can tell.
"""

from typing import ClassVar

import torch
from torch import Tensor

from lightllm.kernels import ref
from lightllm.layers.linear import DenseLinear, LinearMethod, PackedLinear
from lightllm.weights.base import PackedTensor


class Ops:
    """Plain torch. See kernels/ref.py for formulas, shapes and dtypes.

    Attributes:
        name: for the log.
        computes_packed: quantised weights are fast as they are, so that loading keeps them.
        uses_torch_threads: it computes on torch's threads, not on its own.
    """

    name: ClassVar[str] = "torch"
    computes_packed: ClassVar[bool] = False
    uses_torch_threads: ClassVar[bool] = True

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise [..., size] into a new tensor."""
        return ref.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place; return its norm as a new tensor."""
        return ref.add_rms_norm(x, residual, weight, eps)

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotate heads [n, num_heads, head_dim] in place by angles [n, rotary_dim / 2]."""
        ref.rotate_(x, cos, sin)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of [n, 2 * size]."""
        return ref.silu_and_mul(gate_up)

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        """gelu(gate) * up of [n, 2 * size], tanh approximation."""
        return ref.gelu_and_mul(gate_up)

    def gated_linear(self, activation: str, gate_up: Tensor, linear: LinearMethod) -> Tensor:
        """Put act(gate) * up of [n, 2 * size] through a linear; `activation` names the method for it."""
        gated: Tensor = getattr(self, activation)(gate_up)
        return linear(gated)

    def dense_linear(self, weight: Tensor, bias: Tensor | None) -> LinearMethod:
        """Make a linear of a weight [out_features, in_features] in the compute dtype; takes it over."""
        return DenseLinear(weight, bias)

    def packed_linear(
        self, parts: tuple[PackedTensor, ...], bias: Tensor | None, dtype: torch.dtype
    ) -> LinearMethod:
        """Make a linear of quantised rows, one part below the other, that computes in `dtype`."""
        return PackedLinear(parts, bias, dtype)
