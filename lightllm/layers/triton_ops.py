"""TritonOps: the operations of layers as fused kernels for a GPU.

Linears of several rows stay torch's, which calls the vendor's library; packed weights stay with the plain
version.
"""

from typing import ClassVar

from torch import Tensor

from lightllm.kernels import gated_activation, gemv, rms_norm, rotate
from lightllm.layers.linear import DenseLinear, LinearMethod
from lightllm.layers.ops import Ops


class GpuLinear(DenseLinear):
    """A dense weight, for which one row goes the way that reads the weight fastest."""

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1 and x.is_contiguous():
            return gemv.gemv(x, self.weight, self.bias)
        return super().__call__(x)


class TritonOps(Ops):
    """See kernels/: one file for each of these, with its plain version in kernels/ref.py."""

    name: ClassVar[str] = "triton"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm.add_rms_norm(x, residual, weight, eps)

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        rotate.rotate_(x, cos, sin)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return gated_activation.silu_and_mul(gate_up)

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        return gated_activation.gelu_and_mul(gate_up)

    def gated_linear(self, activation: str, gate_up: Tensor, linear: LinearMethod) -> Tensor:
        is_row = gate_up.shape[0] == 1 and gate_up.is_contiguous()
        if is_row and activation == "silu_and_mul" and isinstance(linear, GpuLinear):
            return gemv.gemv(gate_up, linear.weight, linear.bias, is_gated=True)
        return super().gated_linear(activation, gate_up, linear)

    def dense_linear(self, weight: Tensor, bias: Tensor | None) -> LinearMethod:
        return GpuLinear(weight, bias)
