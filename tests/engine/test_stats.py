"""The throughput line: what it counts, when it comes, and when it does not."""

import pytest

from lightllm.engine.stats import StatsLog
from lightllm.messages import EngineStats


def test_one_line_per_interval_while_there_are_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now_s = 100.0
    log = StatsLog(10.0, clock=lambda: now_s)
    for second in range(25):
        now_s = 100.0 + second
        log.note(
            EngineStats(
                steps_total=4 * second,
                prompt_tokens_total=20 * second,
                cached_tokens_total=5 * second,
                generated_tokens_total=8 * second,
                requests_running=3,
                kv_used_tokens=70,
                kv_total_tokens=100,
            )
        )
    line = (
        "prompt 20.0 tok/s (25 % cached), output 8.0 tok/s, 4.0 steps/s; 3 running, 0 waiting; "
        "KV 70 of 100 tokens"
    )
    assert [record.getMessage() for record in caplog.records] == [line, line]


def test_an_idle_time_is_not_averaged_in(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now_s = 0.0
    log = StatsLog(10.0, clock=lambda: now_s)
    for at_s, total in ((0.0, 1), (9.0, 500), (500.0, 501), (505.0, 506), (510.0, 510)):
        now_s = at_s
        log.note(EngineStats(generated_tokens_total=total))
    (record,) = caplog.records
    assert "output 1.0 tok/s" in record.getMessage()
