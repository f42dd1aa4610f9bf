"""Linears of which each rank holds a part: the part computes, then the ranks put their results together.

A model is handed these in place of its linears and does not know. Oracle: the whole linear on one rank. Runs
in the worker.
"""

import torch
from torch import Tensor

from lightllm.distributed.collectives import Collectives
from lightllm.layers.linear import LinearMethod


class ReducedLinear(LinearMethod):
    """A linear cut by columns: y = sum over ranks of x_r W_r^T. https://arxiv.org/abs/1909.08053

    Args:
        part: this rank's columns; only one rank's has the bias.
        collectives: add up.
    """

    def __init__(self, part: LinearMethod, collectives: Collectives) -> None:
        self.part, self.collectives = part, collectives
        self.num_bytes = part.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.collectives.all_reduce(self.part(x))

    def rows(self, indices: Tensor) -> Tensor:
        raise NotImplementedError("a weight that is cut by columns is no table to look rows up in")


class VocabLinear(LinearMethod):
    """An embedding or output head cut by rows, tokens [start, stop) on this rank.

    Args:
        part: this rank's rows.
        tokens: which tokens' these are.
        widths: number of tokens of each rank.
        collectives: add up what is looked up, and gather scores on the leader.
    """

    def __init__(
        self, part: LinearMethod, tokens: range, widths: tuple[int, ...], collectives: Collectives
    ) -> None:
        self.part, self.tokens, self.widths, self.collectives = part, tokens, widths, collectives
        self.num_bytes = part.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """Scores of all tokens [n, vocab_size] on the leader, [n, 0] elsewhere."""
        return self.collectives.gather_columns(self.part(x), self.widths)

    def rows(self, indices: Tensor) -> Tensor:
        """Every token's row, from the rank that has it; the others add zero."""
        own = indices - self.tokens.start
        is_other = (own < 0) | (own >= len(self.tokens))
        found = self.part.rows(torch.where(is_other, 0, own))
        return self.collectives.all_reduce(found.masked_fill_(is_other[:, None], 0.0))
