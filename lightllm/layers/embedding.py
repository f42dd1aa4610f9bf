"""Token embeddings, which may share their weight with the output head."""

from torch import Tensor

from lightllm.layers.linear import LinearMethod


class Embedding:
    """Rows of a weight, looked up by token id.

    Args:
        weight: [vocab_size, hidden_size]; the same object serves as the head of a model that ties them.
    """

    def __init__(self, weight: LinearMethod) -> None:
        self.weight = weight

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Look up [n] int64 ids: a new tensor [n, hidden_size]."""
        return self.weight.rows(token_ids)
