"""Percentiles, rates, LightLLM's lines and keys, and what is said about odd requests."""

import numpy as np
import pytest

from lightllm.bench.load import RequestResult
from lightllm.bench.report import PERCENTILES, RunFacts, format_report, percentile, summarise

LIGHTLLM_KEYS = [
    "backend",
    "clients",
    "request_num",
    "Total QPS",
    "Avg Input Length",
    "Avg Output Length",
    "Total Throughput",
    "Input Throughput",
    "Output Throughput",
    "request_time",
    "first_token_time_dict",
    "decode_token_time_dict",
]


def facts(**changes):
    values = {
        "backend": "lightllm",
        "clients": 4,
        "url": "http://h/generate_stream",
        "model": "m",
        "server": "lightllm 1.0, model m",
        "command": "lightllm bench --seed 0",
        "seed": 0,
        "input_len": 10,
        "output_len": 8,
        "input_qps": 0.0,
        "num_jobs": 3,
        "duration_s": 2.0,
    }
    return RunFacts(**(values | changes))


def valid(index, **changes):
    values = {
        "asked_tokens": 8,
        "prompt_tokens": 10,
        "output_tokens": 8,
        "request_s": 1.0 + index,
        "first_token_s": 0.25,
        "decode_token_s": 0.05,
        "gaps_s": [0.04, 0.06],
    }
    return RequestResult(index=index, **(values | changes))


@pytest.mark.parametrize("num", [1, 2, 7, 100])
def test_percentiles_are_those_of_numpy(num):
    values = np.random.default_rng(num).exponential(size=num)
    for share in PERCENTILES:
        assert percentile(list(values), share) == pytest.approx(np.percentile(values, share))


def test_the_keys_are_lightllms_and_ours_follow():
    summary = summarise([valid(0)], facts(num_jobs=1))
    assert list(summary)[: len(LIGHTLLM_KEYS)] == LIGHTLLM_KEYS
    assert list(summary["request_time"]) == ["P25", "P50", "P75", "P90", "P95", "P99", "P100"]


def test_rates_count_valid_requests_only():
    failed = RequestResult(index=2, asked_tokens=8, failure="cut", message="gone", output_tokens=5)
    summary = summarise([valid(0), valid(1, output_tokens=6), failed], facts())
    assert (summary["request_num"], summary["all_request_num"]) == (2, 3)
    assert summary["Total QPS"] == 1.0
    assert summary["Avg Output Length"] == 7.0
    assert summary["Input Throughput"] == 10.0
    assert summary["Output Throughput"] == 7.0
    assert summary["Total Throughput"] == 17.0
    assert summary["request_time"]["P50"] == 1.5  # seconds
    assert summary["decode_token_time_dict"]["P50"] == pytest.approx(50)  # milliseconds
    assert summary["inter_token_gap_dict"]["P100"] == pytest.approx(60)


def test_failures_are_counted_by_kind_with_three_different_examples():
    messages = ["HTTP 429: full", "HTTP 429: full", "HTTP 500: a", "HTTP 500: b", "HTTP 500: c"]
    results = [
        RequestResult(index=i, asked_tokens=8, failure="status", message=message)
        for i, message in enumerate(messages)
    ]
    results.append(RequestResult(index=5, asked_tokens=8, failure="connect", message="refused"))
    summary = summarise(results, facts(num_jobs=6))
    assert summary["failures"]["status"] == {
        "count": 5,
        "examples": ["HTTP 429: full", "HTTP 500: a", "HTTP 500: b"],
    }
    text = format_report(summary)
    assert "valid num = 0; all data num = 6; valid ratio = 0.0" in text
    assert "failures: status 5, connect 1" in text
    assert "  status: HTTP 500: a" in text
    assert "request_time: no data" in text


def test_what_is_odd_is_said():
    results = [valid(0, prompt_tokens=12), valid(1, output_tokens=5), valid(2, prompt_tokens=None)]
    text = format_report(summarise(results, facts()))
    assert "by the server's count 1 requests differ from the 10 tokens asked, by +2\n" in text
    assert "input length: the server did not report it for 1 requests" in text
    assert "wrong output lengths: 1 requests\n  request 1: asked 8, got 5" in text
    assert "cached prompt tokens: not reported" in text


def test_cached_tokens_come_from_the_requests_or_else_from_the_server():
    assert summarise([valid(0)], facts(cached_prompt_tokens=7))["cached_prompt_tokens"] == 7
    assert summarise([valid(0, cached_tokens=3)], facts(cached_prompt_tokens=7))["cached_prompt_tokens"] == 3


def test_the_lines_are_lightllms():
    lines = format_report(summarise([valid(0), valid(1)], facts(num_jobs=2))).splitlines()
    assert lines[1] == "valid num = 2; all data num = 2; valid ratio = 1.0"
    assert "Total QPS: 1.0" in lines
    assert "Output Throughput: 8.0 token/s" in lines
    assert "request_time P50: 1.500000s" in lines
    assert "first_token_time  P50: 0.250000s" in lines
    assert "decode_token_time  P50: 50.000000ms" in lines
    assert "inter_token_gap  P25: 40.000000ms" in lines
    assert "server: lightllm 1.0, model m" in lines
    assert "command: lightllm bench --seed 0" in lines
    assert lines[-1].startswith("{'backend': 'lightllm', 'clients': 4,")
