"""Root-mean-square normalisation."""

import torch
from torch import Tensor


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. https://arxiv.org/abs/1910.07467

    Statistics are float32 whatever the dtype of x; the result has the dtype of x.

    Args:
        weight: [size].
        eps: added to the mean square.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self._eps = torch.tensor(eps, dtype=torch.float32, device=weight.device)
        self._inverse_size = 1.0 / weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise [..., size] into a new tensor."""
        # Measured on a CPU, 16 rows of 576: 15 us, functional.rms_norm 31 us.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # [..., 1]
        scale = torch.addcmul(self._eps, norm, norm, value=self._inverse_size).rsqrt_()
        return (x * scale).to(x.dtype).mul_(self.weight)
