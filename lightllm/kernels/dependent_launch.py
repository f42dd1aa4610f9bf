"""Kernels that are launched before the one ahead of them is done, and wait inside for what it writes.

Programmatic dependent launch (CUDA C++ programming guide) on GPUs of compute capability 9 and later: a chain
of small kernels then loses no time between them, and a kernel may read what never changes (weights) before.
A kernel launched with `launch_options` has a constant IS_DEPENDENT, calls `start` first of all, and `wait`
before it reads or writes anything that other kernels touch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MIN_CAPABILITY = 9


@triton.jit
def start(IS_DEPENDENT: tl.constexpr):  # noqa: ANN201
    """Let the next kernel be launched as soon as all programs of this one have begun."""
    if IS_DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait(IS_DEPENDENT: tl.constexpr):  # noqa: ANN201
    """Wait until the kernel before this one is done and what it wrote is visible."""
    if IS_DEPENDENT:
        gdc_wait()


def launch_options(tensor: Tensor, num_rows: int) -> dict[str, Any]:
    """Return arguments of a launch for so many rows on the device of this tensor.

    Only a single row is a chain of small kernels; on an H100, batches of 64 and 256 lost 0.5 to 1 %.
    """
    is_chain = num_rows == 1 and tensor.device.type == "cuda"
    if is_chain and torch.cuda.get_device_capability(tensor.device)[0] >= MIN_CAPABILITY:
        return {"IS_DEPENDENT": True, "launch_pdl": True}
    return {"IS_DEPENDENT": False}
