"""Token embeddings, which may share their weight with the output head."""

import torch
from torch import Tensor

from lightllm.layers.linear import LinearMethod


class Embedding:
    """Rows of a weight, looked up by token id.

    Args:
        weight: [vocab_size, hidden_size]; the same object serves as the head of a model that ties them.
        scale: factor of what is looked up, rounded to the dtype of the weight as in training; None for 1.
    """

    def __init__(self, weight: LinearMethod, scale: float | None = None) -> None:
        self.weight = weight
        self.scale = scale

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Look up [n] int64 ids: a new tensor [n, hidden_size]."""
        rows = self.weight.rows(token_ids)
        return rows if self.scale is None else rows.mul_(torch.tensor(self.scale, dtype=rows.dtype))
