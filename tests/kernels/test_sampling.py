"""Drawing and penalties on the device against their plain versions and against the sampler of the CPU."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton, which is not installed here")

from lightllm.kernels import penalties, ref
from lightllm.kernels.sample import sample_tokens
from lightllm.sampling_params import SamplingParams
from lightllm.worker.sampler import RowState, SamplingRow, counter_uniform, sample

GPU = pytest.mark.gpu
FILTERS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (1.3, 0, 1.0, 0.0),
    "cold": (0.2, 0, 1.0, 0.0),
    "top_k": (1.0, 5, 1.0, 0.0),
    "top_k of everything": (1.0, 10**6, 1.0, 0.0),
    "top_p": (1.5, 0, 0.8, 0.0),
    "top_p of nothing": (1.5, 0, 0.0, 0.0),
    "min_p": (1.5, 0, 1.0, 0.05),
    "all": (0.9, 40, 0.95, 0.01),
}


def problem(vocab_size: int, num_rows: int, values: tuple[float, ...], device: torch.device):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 3
    params = torch.tensor(values)[:, None].repeat(1, num_rows)
    noise = torch.rand(num_rows, generator=generator)
    return logits.to(device), params.to(device), noise.to(device)


@pytest.mark.parametrize("values", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize(
    ("vocab_size", "num_rows"),
    [(300, 6), pytest.param(32000, 256, marks=GPU), pytest.param(151936, 64, marks=GPU)],
)
def test_draws_as_the_plain_version(vocab_size: int, num_rows: int, values, device: torch.device) -> None:
    logits, params, noise = problem(vocab_size, num_rows, values, device)
    got, expected = sample_tokens(logits, params, noise), ref.sample_tokens(logits, params, noise)
    # Where the noise falls between two tokens up to rounding, either is right.
    assert (got != expected).float().mean() <= (0.02 if vocab_size > 1000 else 0.0)


@pytest.mark.parametrize("values", [FILTERS["top_k"], FILTERS["top_p"], FILTERS["plain"]])
def test_equal_logits_are_drawn_evenly_and_in_order(values, device: torch.device) -> None:
    logits = torch.zeros(8, 10, device=device)
    logits[:, 3] = -torch.inf
    params = torch.tensor(values)[:, None].repeat(1, 8).to(device)
    noise = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.999], device=device)
    assert sample_tokens(logits, params, noise).tolist() == ref.sample_tokens(logits, params, noise).tolist()


def test_draws_as_the_sampler_of_the_cpu(device: torch.device) -> None:
    fields = [
        {"temperature": 0.7},
        {"temperature": 1.2, "top_k": 7},
        {"temperature": 1.2, "top_p": 0.6},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 1.1, "top_p": 0.9, "top_k": 20},
        {},
    ]
    all_params = [SamplingParams(do_sample=bool(f), seed=3, **f) for f in fields]
    rows = [
        SamplingRow(RowState(p, 3, eos_token_ids=[], seed=i, sample_index=0), 5, lambda: torch.zeros(5))
        for i, p in enumerate(all_params)
    ]
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(5)) * 2
    noise = counter_uniform(np.arange(6), np.zeros(6, dtype=np.int64), np.full(6, 2))
    columns = [(0.0 if p.is_greedy else p.temperature, max(p.top_k, 0), p.top_p, p.min_p) for p in all_params]
    params = torch.tensor(columns).T.contiguous().to(device)
    got = sample_tokens(logits.to(device), params, torch.from_numpy(noise).float().to(device))
    assert got.tolist() == sample(logits, rows).token_ids.tolist()


def test_penalties(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 200, generator=generator).to(device)
    table = torch.randint(0, 60, (3, 1500), generator=generator).int().to(device)
    lines = torch.tensor([3, 0], dtype=torch.int32, device=device)
    spans = torch.tensor([[2, 4, 1300], [0, 0, 7]], dtype=torch.int32, device=device)
    params = torch.tensor([[1.3, 0.5, 0.2], [1.0, 0.0, -0.4]], device=device)
    expected = logits.clone()
    ref.penalise_(expected, lines, table, spans, params, 1300)
    penalties.penalise_(logits, lines, table, spans, params, 1300)
    torch.testing.assert_close(logits, expected)
