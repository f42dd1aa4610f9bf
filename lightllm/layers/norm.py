"""Root-mean-square normalisation."""

from torch import Tensor

from lightllm.layers.ops import Ops


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. https://arxiv.org/abs/1910.07467

    Statistics are float32 whatever the dtype of x; the result has the dtype of x.

    Args:
        weight: [size].
        eps: added to the mean square.
        ops: computes it.
    """

    def __init__(self, weight: Tensor, eps: float, ops: Ops) -> None:
        self.weight = weight
        self.eps = eps
        self.ops = ops

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise [..., size] into a new tensor."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x in place, [n, size] both; return its norm as a new tensor."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
