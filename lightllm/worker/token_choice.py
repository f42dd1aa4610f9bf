"""Who chooses the tokens where several ranks compute one model: the leader, and it tells the others.

Only the leader has the scores of all tokens. That every rank would come to the same token from the same
scores could be hoped for, but hosts may differ in their processors and thereby in a last bit, and ranks that
have once disagreed compute different requests from then on. Runs in the worker.
"""

from typing import Protocol

import torch
from torch import Tensor

from lightllm.distributed.collectives import Collectives
from lightllm.messages import TokenLogprobs
from lightllm.worker.sampler import SampledTokens, SamplingRow, sample, token_logprobs


class TokenChoice(Protocol):
    """Chooses and scores tokens on a CPU."""

    def choose(self, logits: Tensor, rows: list[SamplingRow]) -> SampledTokens:
        """See sampler.sample."""
        ...

    def score(self, logits: Tensor, token_ids: Tensor, num_alternatives: list[int]) -> list[TokenLogprobs]:
        """See sampler.token_logprobs."""
        ...


class OwnChoice:
    """There is one rank."""

    def choose(self, logits: Tensor, rows: list[SamplingRow]) -> SampledTokens:
        return sample(logits, rows)

    def score(self, logits: Tensor, token_ids: Tensor, num_alternatives: list[int]) -> list[TokenLogprobs]:
        return token_logprobs(logits, token_ids, num_alternatives)


class LeadersChoice(OwnChoice):
    """Chooses, and tells the others."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives

    def choose(self, logits: Tensor, rows: list[SamplingRow]) -> SampledTokens:
        sampled = sample(logits, rows)
        self.collectives.broadcast(sampled.token_ids)
        return sampled


class FollowersChoice:
    """Hears what the leader has chosen; reports nothing, since the leader does."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives

    def choose(self, logits: Tensor, rows: list[SamplingRow]) -> SampledTokens:
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        self.collectives.broadcast(token_ids)
        return SampledTokens(token_ids, {})

    def score(self, logits: Tensor, token_ids: Tensor, num_alternatives: list[int]) -> list[TokenLogprobs]:
        return []


def make_choice(rank: int, size: int, collectives: Collectives) -> TokenChoice:
    """The one of that rank."""
    if size == 1:
        return OwnChoice()
    return FollowersChoice(collectives) if rank else LeadersChoice(collectives)
