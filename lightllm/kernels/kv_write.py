"""New keys and values into their slots. Plain version: ref.kv_write.

One program per token; the heads of a token are contiguous in the source and in the pool.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kv_write_kernel(
    k, v, pool_k, pool_v, slots, size, k_stride, v_stride, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    for start in tl.static_range(0, BLOCK, STEP):
        columns = start + tl.arange(0, STEP)
        mask = columns < size
        tl.store(pool_k + slot * size + columns, tl.load(k + token * k_stride + columns, mask), mask)
        tl.store(pool_v + slot * size + columns, tl.load(v + token * v_stride + columns, mask), mask)


def kv_write(k: Tensor, v: Tensor, pool_k: Tensor, pool_v: Tensor, slots: Tensor) -> None:
    """pool[slots[i]] = x[i] for keys and values.

    Args:
        k, v: [n, num_kv_heads, head_dim], each token contiguous.
        pool_k, pool_v: [num_slots, num_kv_heads, head_dim], contiguous, changed in place.
        slots: [n] int64; only padding (slot 0) may occur twice.
    """
    if not k.shape[0]:
        return
    size = k.shape[1] * k.shape[2]
    block = triton.next_power_of_2(size)
    step = min(block, 4096)
    _kv_write_kernel[(k.shape[0],)](
        k,
        v,
        pool_k,
        pool_v,
        slots,
        size,
        k.stride(0),
        v.stride(0),
        BLOCK=block,
        STEP=step,
        num_warps=min(8, max(1, step // 512)),
    )
