"""The plain version of every fused operation: torch only, right on every device, the oracle of the fast ones.

Statistics and angles are float32 whatever the dtype of the data; results have the dtype of the data.
"""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. https://arxiv.org/abs/1910.07467

    Args:
        x: [..., size], any strides.
        weight: [size].
        eps: added to the mean square.

    Returns:
        A new tensor of the shape and dtype of x.
    """
    # Measured on a CPU, 16 rows of 576: 15 us, functional.rms_norm 31 us.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # [..., 1]
    scale = torch.rsqrt(norm * norm * (1.0 / weight.shape[0]) + eps)
    return (x * scale).to(x.dtype).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place, then the norm of the residual as a new tensor; both [n, size]."""
    return rms_norm(residual.add_(x), weight, eps)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate heads in place: (a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of what is rotated.

    https://arxiv.org/abs/2104.09864, in the layout of HF models: i is paired with i + rotary_dim / 2.

    Args:
        x: [n, num_heads, head_dim], last dimension contiguous; only the first rotary_dim dimensions change.
        cos, sin: [n, rotary_dim / 2] float32.
    """
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    rotated = torch.addcmul(a * cos, b, sin, value=-1)
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(rotated)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, for [n, 2 * size] with the gate in the first half; a new tensor [n, size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up with the tanh approximation, in the layout of `silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh").mul_(up)
