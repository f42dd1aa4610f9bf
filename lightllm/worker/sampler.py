"""Choose tokens from logits, by counter-based noise.

Owns no state between steps: what a token depends on is its logits, its request's parameters and the triple
(seed, sample, index of the output token). So a request samples the same tokens after preemption, on another
node or in another batch, as far as its logits are the same. Runs in the worker, on any device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightllm.messages import TokenLogprobs
from lightllm.sampling_params import SamplingParams

NUM_CANDIDATES = 1024
# Larger logits are cut to this: an infinite one would make the softmax of its row undefined.
MAX_LOGIT = 1e30
# A repetition penalty that float32 can still divide by; zero times minus infinity would be no number.
MIN_PENALTY = 1e-30


@dataclass(slots=True)
class RowState:
    """What the sampler knows of a request: fixed while the request holds its row."""

    params: SamplingParams
    num_prompt_tokens: int
    eos_token_ids: list[int]
    seed: int
    sample_index: int
    processors: "tuple[Processor, ...]" = ()

    def __post_init__(self) -> None:
        self.processors = tuple(process for applies, process in PIPELINE if applies(self.params))


@dataclass(slots=True)
class SamplingRow:
    """One row to sample: its request, how many tokens it has (prompt and output), and those on demand."""

    state: RowState
    num_tokens: int
    read_tokens: Callable[[], Tensor]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.state.num_prompt_tokens


@dataclass(slots=True)
class SampledTokens:
    """`token_ids`: [n] int64 on the device. `logprobs`: by index into the rows, only where asked for."""

    token_ids: Tensor
    logprobs: dict[int, TokenLogprobs]


Processor = Callable[[Tensor, SamplingRow], None]
"""Changes one row's logits [vocab] in place."""


def sample(logits: Tensor, rows: list[SamplingRow]) -> SampledTokens:
    """Choose one token per row.

    Args:
        logits: [n, vocab], float32; changed in place.
        rows: what is sampled for, n of them.

    Returns:
        The tokens. Does not synchronise the device unless a row asks for logprobs or is sampled with top_p.
    """
    params = [row.state.params for row in rows]
    wants_logprobs = [i for i, p in enumerate(params) if p.logprobs is not None]
    raw = (
        logits[wants_logprobs] if wants_logprobs else None
    )  # a copy: what the processors change is not reported
    for i, row in enumerate(rows):
        for process in row.state.processors:
            process(logits[i], row)
    chosen = logits.argmax(dim=-1)
    random_rows = [i for i, p in enumerate(params) if not p.is_greedy]
    if random_rows:
        noise = _noise([rows[i] for i in random_rows]).to(logits.device)
        chosen[random_rows] = _sample_random(logits[random_rows], [params[i] for i in random_rows], noise)
    logprobs: dict[int, TokenLogprobs] = {}
    if raw is not None:
        counts = [params[i].logprobs or 0 for i in wants_logprobs]
        for i, entry in zip(wants_logprobs, token_logprobs(raw, chosen[wants_logprobs], counts), strict=True):
            logprobs[i] = entry
    return SampledTokens(token_ids=chosen, logprobs=logprobs)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_alternatives: list[int]) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens and of the most likely alternatives.

    Args:
        logits: [n, vocab] float32.
        token_ids: [n] int64.
        num_alternatives: per row, how many of the most likely tokens to name.
    """
    most = max(num_alternatives)
    tensors = logprob_tensors(logits, token_ids, most)
    return list_logprobs([tensor.cpu().numpy() for tensor in tensors], num_alternatives)


def logprob_tensors(logits: Tensor, token_ids: Tensor, num_alternatives: int) -> tuple[Tensor, ...]:
    """The log-probability of each token [n], and of the most likely ids and values [n, num_alternatives]."""
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    chosen = (logits.gather(1, token_ids[:, None]) - normaliser)[:, 0]
    top = logits.topk(num_alternatives, dim=-1)
    return chosen, top.indices, top.values - normaliser


def list_logprobs(tensors: Sequence[np.ndarray], num_alternatives: list[int]) -> list[TokenLogprobs]:
    """What `logprob_tensors` made, on the host and as messages."""
    chosen, top_ids, top_values = (tensor.tolist() for tensor in tensors)
    return [
        TokenLogprobs(logprob=value, top_ids=ids[:count], top_logprobs=values[:count])
        for value, ids, values, count in zip(chosen, top_ids, top_values, num_alternatives, strict=True)
    ]


def counter_uniform(seeds: np.ndarray, samples: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on nothing but their counters.

    The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)
    applied once per key word.

    Args:
        seeds, samples, indices: int64 [n], any values.
    Returns:
        float64 [n].
    """
    state = np.zeros(len(seeds), dtype=np.uint64)
    for word in (seeds, samples, indices):
        state = _mix(state + word.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return np.ldexp((state >> np.uint64(11)).astype(np.float64), -53)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def _noise(rows: list[SamplingRow]) -> Tensor:
    seeds = np.array([row.state.seed for row in rows], dtype=np.int64)
    samples = np.array([row.state.sample_index for row in rows], dtype=np.int64)
    indices = np.array([row.num_output_tokens for row in rows], dtype=np.int64)
    return torch.from_numpy(counter_uniform(seeds, samples, indices))


def _sample_random(logits: Tensor, params: list[SamplingParams], noise: Tensor) -> Tensor:
    """Sample by inverting the cumulative distribution of what the filters leave; [n] int64."""
    temperatures = torch.tensor([p.temperature for p in params], device=logits.device)
    probs = torch.softmax(logits / temperatures[:, None], dim=-1)  # [n, vocab]
    chosen = _invert(probs, noise)
    filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0]
    if filtered:
        chosen[filtered] = _sample_filtered(probs[filtered], [params[i] for i in filtered], noise[filtered])
    return chosen


def _sample_filtered(probs: Tensor, params: list[SamplingParams], noise: Tensor) -> Tensor:
    """Sample under top_k, then top_p, then min_p; [n] int64."""
    kept, ids = _candidates(probs, params)  # [n, c], most likely first
    rank = torch.arange(kept.shape[1], device=kept.device)
    top_k = torch.tensor([p.top_k if p.top_k > 0 else kept.shape[1] for p in params], device=kept.device)
    top_p = torch.tensor([p.top_p for p in params], device=kept.device)
    min_p = torch.tensor([p.min_p for p in params], device=kept.device)
    before = kept.cumsum(dim=-1) - kept  # mass of the more likely tokens
    keep = (rank < top_k[:, None]) & (before < top_p[:, None]) & (kept >= min_p[:, None] * kept[:, :1])
    keep[:, 0] = True  # top_p = 0 means only the most likely
    return ids.gather(1, _invert(kept * keep, noise)[:, None])[:, 0]


def _candidates(probs: Tensor, params: list[SamplingParams]) -> tuple[Tensor, Tensor]:
    """The most likely tokens in order: enough of them that no filter can keep one that is left out."""
    vocab_size = probs.shape[1]
    count = max([NUM_CANDIDATES, *(p.top_k for p in params)])
    if count < vocab_size:
        top = probs.topk(count, dim=-1)
        mass = top.values.sum(dim=-1).tolist()
        least = (top.values[:, -1] / top.values[:, 0]).tolist()
        if all(
            0 < p.top_k <= count or p.top_p <= mass[i] - 1e-4 or p.min_p > least[i]
            for i, p in enumerate(params)
        ):
            return top.values, top.indices
    values, ids = probs.sort(dim=-1, descending=True, stable=True)
    return values, ids


def _invert(weights: Tensor, noise: Tensor) -> Tensor:
    """Index at which the cumulative weight passes `noise` of the total; never an index of weight zero."""
    cumulative = weights.double().cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    found = torch.searchsorted(cumulative, noise[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total, right=False)  # where the product rounds up to the total
    # Weights that are no numbers are passed by nothing; an index beyond the last would end the engine.
    return torch.minimum(found, last)[:, 0].clamp_(max=weights.shape[1] - 1)


# ---------------------------------------------------------------- the pipeline of logit processors


def _allow_only(logits: Tensor, row: SamplingRow) -> None:
    allowed = _beside(logits, row.state.params.allowed_token_ids)
    kept = logits[allowed]
    logits.fill_(-torch.inf)
    logits[allowed] = kept


def _add_bias(logits: Tensor, row: SamplingRow) -> None:
    bias = row.state.params.logit_bias
    logits[_beside(logits, list(bias))] += _beside(logits, list(bias.values()))


def penalise_row(logits: Tensor, row: SamplingRow) -> None:
    """Repetition, then frequency and presence penalties; the one processor that reads the row's tokens."""
    params = row.state.params
    token_ids = row.read_tokens()
    if params.repetition_penalty != 1.0:
        seen = torch.unique(token_ids)
        values, penalty = logits[seen], max(params.repetition_penalty, MIN_PENALTY)
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty).clamp_(max=MAX_LOGIT)
    counted = token_ids if params.input_penalty else token_ids[row.state.num_prompt_tokens :]
    if len(counted) and (params.frequency_penalty or params.presence_penalty):
        ids, counts = torch.unique(counted, return_counts=True)
        logits[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _ban_early_end(logits: Tensor, row: SamplingRow) -> None:
    params = row.state.params
    banned = row.state.eos_token_ids + params.stop_token_ids
    if params.allowed_token_ids and set(banned).issuperset(params.allowed_token_ids):
        return  # nothing would be left; the scheduler does not end the request at these before its minimum
    if row.num_output_tokens + 1 < params.min_new_tokens:
        logits.index_fill_(0, _beside(logits, banned), -torch.inf)


def _favour_end(logits: Tensor, row: SamplingRow) -> None:
    start, factor = row.state.params.exponential_decay_length_penalty
    past = row.num_output_tokens - start
    end_ids = row.state.eos_token_ids
    if past > 0 and end_ids:
        places = _beside(logits, end_ids)
        values = logits[places]
        gain = math.expm1(min(past * math.log(factor), math.log(MAX_LOGIT)))
        raised = (values + values.abs() * gain).clamp_(max=MAX_LOGIT)
        logits[places] = torch.where(values.isinf(), values, raised)  # one that is not allowed stays so


def _beside(logits: Tensor, values: list[int] | list[float]) -> Tensor:
    """A tensor of these on the device of `logits`, made without waiting for what the device is doing."""
    tensor = torch.tensor(values, dtype=torch.int64 if not values else None)
    return tensor.pin_memory().to(logits.device, non_blocking=True) if logits.is_cuda else tensor


PIPELINE: tuple[tuple[Callable[[SamplingParams], bool], Processor], ...] = (
    (lambda p: bool(p.allowed_token_ids), _allow_only),
    (lambda p: bool(p.logit_bias), _add_bias),
    (lambda p: p.has_penalties, penalise_row),
    (lambda p: p.exponential_decay_length_penalty[1] != 1.0, _favour_end),
    (lambda p: p.min_new_tokens > 1, _ban_early_end),
)
