"""One row through a linear: y = x W^T + b at the speed at which W can be read. Plain version: ref.linear.

Each program owns BLOCK_N rows of W and adds up products elementwise in float32 over blocks of columns, with
the sum across columns only at the end. The matrix units would do the work of 8 or more rows for one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gemv_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_columns,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    in_rows = rows < num_rows
    line = weight + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, num_columns, BLOCK_K):
        if IS_EVEN:
            w = tl.load(line + start, in_rows[:, None], other=0.0)
            v = tl.load(x + start + columns)
        else:
            in_columns = start + columns < num_columns
            w = tl.load(line + start, in_rows[:, None] & in_columns[None, :], other=0.0)
            v = tl.load(x + start + columns, in_columns, other=0.0)
        acc += w.to(tl.float32) * v.to(tl.float32)[None, :]
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += tl.load(bias + rows, in_rows, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), in_rows)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map [1, in_features] to a new tensor [1, out_features].

    Args:
        x: contiguous.
        weight: [out_features, in_features], contiguous, the dtype of x.
        bias: [out_features], or None.
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
        IS_EVEN=num_columns % block_k == 0,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
    )
    return out


def shape(num_rows: int, num_columns: int) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_K and warps for a weight of this shape: the best of twelve on an H100, in bfloat16."""
    block_k = min(1024, triton.next_power_of_2(num_columns))
    return 8, block_k, 8 if num_columns % block_k == 0 and block_k == 1024 else 4
