"""TritonOps: the operations of layers as fused kernels for a GPU.

Linears stay torch's, which calls the vendor's library; packed weights stay with the plain version.
"""

from typing import ClassVar

from torch import Tensor

from lightllm.kernels import gated_activation, rms_norm, rotate
from lightllm.layers.ops import Ops


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
