"""What benchmarks/pd_cluster.py counts of its streams: gaps, requests in time, goodput, arrivals."""

import pytest

from benchmarks.open_loop import (
    Record,
    gaps_within,
    goodput,
    keeps,
    poisson_jobs,
    steady_jobs,
    summarise_step,
)


def record(first_s, gaps_s, error=""):
    stamps = [100.0 + first_s]
    for gap in gaps_s:
        stamps.append(stamps[-1] + gap)
    return Record(asked=len(stamps), prompt_tokens=5, sent_s=100.0, stamps=stamps, error=error)


def test_only_gaps_that_end_in_the_window_count():
    records = [record(0.0, [1.0, 2.0, 3.0]), record(0.5, [1.0])]
    assert gaps_within(records, 101.5, 106.0) == pytest.approx([2.0, 1.0])
    assert gaps_within(records, 106.0, 107.0) == pytest.approx([3.0])


@pytest.mark.parametrize(
    ("one", "by_mean", "by_gap"),
    [
        (record(1.9, [0.02] * 50), True, True),
        (record(2.1, [0.02] * 50), False, False),
        (record(1.0, [0.01] * 50 + [0.5]), True, False),
        (record(1.0, [0.04] * 50), False, False),
        (record(1.0, []), True, True),
        (record(1.0, [0.01], error="cut off"), False, False),
        (Record(asked=3, prompt_tokens=5), False, False),
    ],
)
def test_a_request_keeps_its_limits(one, by_mean, by_gap):
    assert keeps(one, 2.0, 0.025) is by_mean
    assert keeps(one, 2.0, 0.025, share=99) is by_gap


def test_goodput_is_the_highest_rate_with_enough_requests_in_time():
    good, late = record(1.0, [0.01] * 10), record(3.0, [0.01] * 10)
    in_time = {4: 10, 6: 9, 8: 8}
    steps = [summarise_step(r, [good] * n + [late] * (10 - n), 2.0, 0.025) for r, n in in_time.items()]
    assert [step["share"] for step in steps] == [1.0, 0.9, 0.8]
    assert goodput(steps, 0.9) == 6
    assert goodput(steps, 0.95) == 4
    assert goodput(steps[2:], 0.9) == 0


def test_errors_are_counted_by_kind():
    cut = [record(1.0, [], error=f"req_{i}0123456789abcdef failed") for i in range(3)]
    step = summarise_step(4.0, [*cut, record(1.0, [])], 2.0, 0.025)
    assert step["errors"] == {"... failed": 3}
    assert step["share"] == 0.25


def test_arrivals_are_repeatable_and_as_many_as_the_rate_says():
    arguments = (20.0, 50.0, (2, 9), (1, 3), 100, 1)
    jobs = poisson_jobs(*arguments)
    assert jobs == poisson_jobs(*arguments)
    assert len(jobs) == pytest.approx(1000, rel=0.1)
    assert {len(job.prompt) for job in jobs} == set(range(2, 10))
    assert [job.due_s for job in steady_jobs(2.0, 2.0, [[1]] * 4, 1)] == [0.0, 0.5, 1.0, 1.5]
