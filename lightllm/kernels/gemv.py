"""One row through a linear: y = x W^T + b at the speed at which W can be read. Plain version: ref.linear.

With a gate, x is silu(gate) * up, rounded as the kernel of that would; each program computes it again.

Each program owns BLOCK_N rows of W and adds up products elementwise in float32 over blocks of columns, with
the sum across columns only at the end. The matrix units would do the work of 8 or more rows for one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm.kernels.dependent_launch import launch_options, start, wait


@triton.jit
def _load_x(x, columns, in_columns, num_columns, IS_GATED: tl.constexpr):
    value = tl.load(x + columns, in_columns, other=0.0)
    if IS_GATED:
        gate = value.to(tl.float32)
        up = tl.load(x + num_columns + columns, in_columns, other=0.0)
        act = (gate * tl.sigmoid(gate)).to(value.dtype).to(tl.float32)
        value = (act * up.to(tl.float32)).to(value.dtype)
    return value.to(tl.float32)[None, :]


@triton.jit
def _gemv_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_columns,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start(IS_DEPENDENT)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    in_rows = rows < num_rows
    line = weight + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    in_columns = columns < num_columns
    # The weight is nobody else's to write: its first block is read before x is there.
    w = tl.load(line, in_rows[:, None] & in_columns[None, :], other=0.0)
    wait(IS_DEPENDENT)
    acc = w.to(tl.float32) * _load_x(x, columns, in_columns, num_columns, IS_GATED)
    for first in range(BLOCK_K, num_columns, BLOCK_K):
        in_columns = first + columns < num_columns
        if IS_EVEN:
            w = tl.load(line + first, in_rows[:, None], other=0.0)
        else:
            w = tl.load(line + first, in_rows[:, None] & in_columns[None, :], other=0.0)
        acc += w.to(tl.float32) * _load_x(x, first + columns, in_columns, num_columns, IS_GATED)
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += tl.load(bias + rows, in_rows, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), in_rows)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None, *, is_gated: bool = False) -> Tensor:
    """Map [1, in_features] to a new tensor [1, out_features].

    Args:
        x: contiguous; with a gate [1, 2 * in_features], the gate first.
        weight: [out_features, in_features], contiguous, the dtype of x.
        bias: [out_features], or None.
        is_gated: put silu(gate) * up through the linear.
    """
    num_rows, num_columns = weight.shape
    out = torch.empty(1, num_rows, dtype=x.dtype, device=x.device)
    block_n, block_k, num_warps = shape(num_rows, num_columns)
    _gemv_kernel[(triton.cdiv(num_rows, block_n),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        num_rows,
        num_columns,
        HAS_BIAS=bias is not None,
        IS_GATED=is_gated,
        IS_EVEN=num_columns % block_k == 0,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        **launch_options(x, 1),
    )
    return out


def shape(num_rows: int, num_columns: int) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_K and warps for a weight of this shape: the best of twelve on an H100, in bfloat16."""
    block_k = min(1024, triton.next_power_of_2(num_columns))
    return 8, block_k, 8 if num_columns % block_k == 0 and block_k == 1024 else 4
