"""The sampler against plain arithmetic: filters, penalties, noise, reported probabilities."""

import math

import numpy as np
import pytest
import torch

from lightllm.sampling_params import SamplingParams
from lightllm.worker.sampler import RowState, SamplingRow, counter_uniform, sample, token_logprobs

VOCAB = 50


def row(
    params: SamplingParams, tokens: list[int] | None = None, *, num_prompt: int = 3, seed: int = 7
) -> SamplingRow:
    tokens = [1, 2, 3] if tokens is None else tokens
    state = RowState(params, num_prompt, eos_token_ids=[0], seed=seed, sample_index=0)
    return SamplingRow(state, len(tokens), lambda: torch.tensor(tokens))


def logits_of(n: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def draw(params: SamplingParams, logits: torch.Tensor, count: int) -> np.ndarray:
    """Sample the same logits at `count` different seeds."""
    rows = [row(params, seed=seed) for seed in range(count)]
    return sample(logits.repeat(count, 1), rows).token_ids.numpy()


def test_greedy_takes_the_most_likely_token_whatever_the_other_fields():
    logits = logits_of(3)
    expected = logits.argmax(-1).tolist()
    rows = [
        row(SamplingParams()),
        row(SamplingParams(temperature=9.0)),
        row(SamplingParams(do_sample=True, temperature=0)),
    ]
    assert sample(logits, rows).token_ids.tolist() == expected


def test_noise_depends_on_seed_sample_and_index_only():
    seeds, samples, indices = np.array([5, 5, 5, 6]), np.array([0, 0, 1, 0]), np.array([3, 4, 3, 3])
    noise = counter_uniform(seeds, samples, indices)
    assert len(set(noise.tolist())) == 4
    alone = counter_uniform(np.array([6]), np.array([0]), np.array([3]))
    assert alone[0] == noise[3]


def test_noise_is_uniform():
    n = 20000
    noise = counter_uniform(np.full(n, -3), np.zeros(n, dtype=np.int64), np.arange(n))
    counts = np.histogram(noise, bins=20, range=(0, 1))[0]
    chi_square = ((counts - n / 20) ** 2 / (n / 20)).sum()
    assert chi_square < 43.8  # p = 0.001 at 19 degrees of freedom


def test_sampled_frequencies_follow_the_softmax():
    logits = logits_of()
    n = 4000
    counts = np.bincount(draw(SamplingParams(do_sample=True, temperature=1.5), logits, n), minlength=VOCAB)
    expected = torch.softmax(logits[0] / 1.5, -1).numpy() * n
    big = expected > 5
    chi_square = ((counts[big] - expected[big]) ** 2 / expected[big]).sum()
    assert chi_square < big.sum() + 4 * math.sqrt(2 * big.sum())


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_p": 0.0}, 1),
        ({"top_p": 0.6}, None),
        ({"min_p": 0.5}, None),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.1}, None),
    ],
)
def test_filters_keep_exactly_the_tokens_they_should(fields, allowed):
    logits = logits_of(seed=3)
    probs = torch.softmax(logits[0], -1).double()
    order = probs.argsort(descending=True)
    mass = 0.0
    expected = set()
    for rank, token in enumerate(order.tolist()):
        is_likely = rank < fields.get("top_k", VOCAB) and probs[token] >= fields.get("min_p", 0) * probs.max()
        if is_likely and (rank == 0 or mass < fields.get("top_p", 1.0)):
            expected.add(token)
        mass += float(probs[token])
    if allowed is not None:
        assert len(expected) == allowed
    drawn = set(draw(SamplingParams(do_sample=True, **fields), logits, 3000).tolist())
    assert drawn == expected


def test_a_row_does_not_depend_on_its_neighbours():
    logits = logits_of(4)
    kinds = [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.2, "temperature": 0.3}]
    rows = [row(SamplingParams(do_sample=True, **kind), seed=i) for i, kind in enumerate(kinds)]
    together = sample(logits.clone(), rows).token_ids.tolist()
    alone = [sample(logits[i : i + 1].clone(), rows[i : i + 1]).token_ids.item() for i in range(4)]
    assert together == alone


def test_penalties_change_logits_as_documented():
    tokens = [1, 2, 3, 4, 4, 5]  # three of the prompt, three of the output
    logits = logits_of()
    base = logits[0].clone()
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    sample(logits, [row(params, tokens)])
    expected = base.clone()
    for token in {1, 2, 3, 4, 5}:
        expected[token] = base[token] / 2.0 if base[token] > 0 else base[token] * 2.0
    expected[4] -= 0.5 + 2 * 0.25
    expected[5] -= 0.5 + 0.25
    torch.testing.assert_close(logits[0], expected)


def test_input_penalty_counts_the_prompt_too():
    logits = logits_of()
    base = logits[0].clone()
    sample(logits, [row(SamplingParams(frequency_penalty=1.0, input_penalty=True), [1, 1, 2, 9])])
    assert [(base - logits[0])[t].item() for t in (1, 2, 9, 3)] == pytest.approx([2.0, 1.0, 1.0, 0.0])


def test_bias_and_allowed_ids():
    logits = logits_of()
    assert sample(logits.clone(), [row(SamplingParams(logit_bias={17: 100.0}))]).token_ids.item() == 17
    chosen = sample(logits.clone(), [row(SamplingParams(allowed_token_ids=[8, 30]))]).token_ids.item()
    assert chosen == (8 if logits[0, 8] > logits[0, 30] else 30)


def test_no_end_token_before_min_new_tokens():
    logits = logits_of()
    logits[0, 0] = 50.0  # the end token
    params = SamplingParams(min_new_tokens=3)
    picks = [sample(logits.clone(), [row(params, [1, 2, 3] + [9] * n)]).token_ids.item() for n in range(4)]
    assert [pick == 0 for pick in picks] == [False, False, True, True]


def test_length_penalty_raises_the_end_token_after_its_start():
    params = SamplingParams(exponential_decay_length_penalty=(2, 1.5))
    for num_output, factor in ((0, 1.0), (2, 1.0), (3, 1.5), (5, 1.5**3)):
        logits = torch.full((1, VOCAB), -2.0)
        sample(logits, [row(params, [1, 2, 3] + [9] * num_output)])
        assert logits[0, 0].item() == pytest.approx(-2.0 + 2.0 * (factor - 1.0))


def test_logprobs_are_of_the_raw_logits_and_hold_the_alternatives():
    logits = logits_of()
    expected = torch.log_softmax(logits[0], -1)
    params = SamplingParams(logprobs=3, logit_bias={17: 100.0})
    result = sample(logits, [row(params)])
    entry = result.logprobs[0]
    assert entry.logprob == pytest.approx(expected[17].item(), abs=1e-5)
    assert entry.top_ids == expected.topk(3).indices.tolist()
    assert entry.top_logprobs == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)


def test_token_logprobs_without_alternatives():
    logits = logits_of(2)
    entries = token_logprobs(logits, torch.tensor([4, 5]), [0, 0])
    expected = torch.log_softmax(logits, -1)
    assert [e.logprob for e in entries] == pytest.approx(
        [expected[0, 4].item(), expected[1, 5].item()], abs=1e-5
    )
    assert all(e.top_ids == [] for e in entries)


def test_filters_on_a_flat_distribution_beyond_the_candidates():
    vocab = 4000
    logits = torch.zeros(1, vocab)
    params = SamplingParams(do_sample=True, top_p=0.9)
    rows = [row(params, seed=s) for s in range(300)]
    drawn = sample(logits.repeat(300, 1), rows).token_ids
    assert drawn.max() < 3601  # 90 % of equally likely tokens, in stable order
    assert len(set(drawn.tolist())) > 200


HOSTILE = [
    ({"allowed_token_ids": [0], "min_new_tokens": 3}, {0}),
    ({"allowed_token_ids": [0, 7], "stop_token_ids": [7], "min_new_tokens": 3}, {0, 7}),
    ({"allowed_token_ids": [5, 6], "exponential_decay_length_penalty": (0, 2.0)}, {5, 6}),
    ({"exponential_decay_length_penalty": (0, 1e308)}, {0}),
    ({"exponential_decay_length_penalty": (0, 1e308), "min_new_tokens": 3}, set(range(1, VOCAB))),
    ({"repetition_penalty": 1e-300}, {1, 2, 3, 9}),
    ({"repetition_penalty": 1e-40, "top_k": 5}, {1, 2, 3, 9}),
    (
        {"repetition_penalty": 100.0, "frequency_penalty": -100.0, "presence_penalty": -100.0},
        set(range(VOCAB)),
    ),
    ({"logit_bias": dict.fromkeys(range(VOCAB), -100.0), "top_k": 2**31 - 1}, set(range(VOCAB))),
]


@pytest.mark.parametrize(("fields", "allowed"), HOSTILE)
@pytest.mark.parametrize("temperature", [1e-5, 1.0, 100.0])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 3, "min_p": 1.0}])
def test_legal_extremes_leave_a_legal_token(fields, allowed, temperature, filters):
    """An id outside the vocabulary would end the engine, and every other request with it."""
    for do_sample in (True, False):
        params = SamplingParams(do_sample=do_sample, temperature=temperature, **{**filters, **fields})
        logits = logits_of(2).abs() + 0.1  # the sign decides what a repetition penalty does
        chosen = sample(logits, [row(params, [1, 2, 3, 9])] * 2).token_ids.tolist()
        assert set(chosen) <= allowed


def test_logits_that_are_no_numbers_leave_an_id_of_the_vocabulary():
    params = SamplingParams(do_sample=True)
    for value in (math.nan, math.inf, -math.inf):
        for fields in ({}, {"top_k": 4}):
            params = SamplingParams(do_sample=True, **fields)
            (chosen,) = sample(torch.full((1, VOCAB), value), [row(params)]).token_ids.tolist()
            assert 0 <= chosen < VOCAB
