"""act(gate) * up, for SiLU and GELU (tanh). Plain versions: ref.silu_and_mul, ref.gelu_and_mul.

One program per row and block of columns; act in float32, rounded to the dtype of the data before the product,
as the plain version does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm.kernels.dependent_launch import launch_options, start, wait

BLOCK = 1024


@triton.jit
def _gated_kernel(
    gate_up, out, size, row_stride, IS_SILU: tl.constexpr, BLOCK: tl.constexpr, IS_DEPENDENT: tl.constexpr
):
    start(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    wait(IS_DEPENDENT)
    gate = tl.load(gate_up + row * row_stride + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + size + columns, mask, other=0.0).to(tl.float32)
    if IS_SILU:
        act = gate * tl.sigmoid(gate)
    else:  # (1 + tanh(z)) / 2 = sigmoid(2 z), z = sqrt(2 / pi) (gate + 0.044715 gate^3)
        act = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    act = act.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + columns, (act * up).to(out.dtype.element_ty), mask)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [n, 2 * size], rows contiguous: a new tensor [n, size]."""
    return _launch(gate_up, is_silu=True)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up of [n, 2 * size], tanh approximation: a new tensor [n, size]."""
    return _launch(gate_up, is_silu=False)


def _launch(gate_up: Tensor, *, is_silu: bool) -> Tensor:
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(size, BLOCK))
        options = launch_options(gate_up, num_rows)
        _gated_kernel[grid](
            gate_up, out, size, gate_up.stride(0), IS_SILU=is_silu, BLOCK=BLOCK, num_warps=4, **options
        )
    return out
