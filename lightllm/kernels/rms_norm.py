"""RMS norm, with or without the residual sum before it. Plain versions: ref.rms_norm, ref.add_rms_norm.

out = x / sqrt(mean(x^2) + eps) * weight, https://arxiv.org/abs/1910.07467. One program per row, the row in
registers; statistics in float32, rounded to the dtype of x where the plain version rounds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm.kernels.dependent_launch import launch_options, start, wait


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    size,
    num_inner,
    x_outer,
    x_inner,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    first = (row // num_inner) * x_outer + (row % num_inner) * x_inner
    scales = tl.load(weight + columns, mask, other=0.0).to(tl.float32)
    wait(IS_DEPENDENT)
    value = tl.load(x + first + columns, mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        place = residual + row * residual_stride + columns
        value += tl.load(place, mask, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(place, rounded, mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    normed = (value * scale).to(out.dtype.element_ty).to(tl.float32)
    result = normed * scales
    tl.store(out + row * size + columns, result.to(out.dtype.element_ty), mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise [n, size] or [n, m, size], last dimension contiguous, into a new contiguous tensor."""
    size = x.shape[-1]
    num_inner = x.shape[1] if x.dim() == 3 else 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, weight, out, num_inner, x.stride(0), x.stride(-2), 0, eps, has_residual=False, size=size)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place, then its norm as a new tensor; [n, size], rows contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stride = residual.stride(0)
    _launch(x, residual, weight, out, 1, x.stride(0), 0, stride, eps, has_residual=True, size=x.shape[1])
    return out


def _launch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    out: Tensor,
    num_inner: int,
    x_outer: int,
    x_inner: int,
    residual_stride: int,
    eps: float,
    *,
    has_residual: bool,
    size: int,
) -> None:
    num_rows = x.numel() // size
    if not num_rows:
        return
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(num_rows,)](
        x,
        residual,
        weight,
        out,
        size,
        num_inner,
        x_outer,
        x_inner,
        residual_stride,
        eps,
        HAS_RESIDUAL=has_residual,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
        **launch_options(x, num_rows),
    )
