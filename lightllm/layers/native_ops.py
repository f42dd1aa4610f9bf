"""NativeOps: the operations of layers by the C kernels, in float32 on the CPU.

Oracle: Ops. Runs in the worker.
"""

from typing import ClassVar

import torch
from torch import Tensor

from lightllm.layers.linear import LinearMethod
from lightllm.layers.native_linear import NativeDense, NativePacked
from lightllm.layers.ops import Ops
from lightllm.native.library import QBLOCK, NativeLibrary
from lightllm.weights.base import PackedTensor


class NativeOps(Ops):
    """All tensors are float32 on the CPU; sums are in one order whatever the batch."""

    name: ClassVar[str] = "native"
    computes_packed: ClassVar[bool] = True
    uses_torch_threads: ClassVar[bool] = False

    def __init__(self, library: NativeLibrary) -> None:
        self.library = library

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, size).contiguous()
        out = torch.empty(x.shape)
        self.library.ll_rms_norm(
            rows.data_ptr(), rows.stride(0), None, weight.data_ptr(), eps, out.data_ptr(), rows.shape[0], size
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        m, size = x.shape
        out = torch.empty(m, size)
        self.library.ll_rms_norm(
            x.data_ptr(), x.stride(0), residual.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), m, size
        )
        return out

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        tokens, num_heads, head_dim = x.shape
        self.library.ll_rotate(
            *(x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr()),
            *(tokens, num_heads, head_dim, cos.shape[1]),
        )

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._gate(gate_up, is_gelu=False)

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._gate(gate_up, is_gelu=True)

    def _gate(self, gate_up: Tensor, is_gelu: bool) -> Tensor:
        gate_up = gate_up.contiguous()
        m, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(m, size)
        self.library.ll_gate(gate_up.data_ptr(), out.data_ptr(), m, size, is_gelu)
        return out

    def dense_linear(self, weight: Tensor, bias: Tensor | None) -> LinearMethod:
        return NativeDense(self.library, weight, bias)

    def packed_linear(
        self, parts: tuple[PackedTensor, ...], bias: Tensor | None, dtype: torch.dtype
    ) -> LinearMethod:
        if parts[0].shape[1] % QBLOCK:
            return super().packed_linear(parts, bias, dtype)
        return NativePacked(self.library, parts, bias)
