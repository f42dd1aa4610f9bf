"""Hypothesis drives the scheduler for a million steps and more; every step is checked.

    python benchmarks/scheduler_soak.py [--steps 1000000] [--seed 0] [--out FILE.json]

The machine is that of tests/scheduler/test_scheduler_properties.py: limits, policies, lags, requests, aborts
and deadlines are drawn, a fake worker checks the KV that each step relies on, and the scheduler checks slots,
locks, rows and states after each. Prints how often what has happened; a breach ends the run with the shortest
sequence of calls that leads to it.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import describe_run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.scheduler.test_scheduler_properties import SchedulerMachine

EXAMPLES_PER_ROUND = 400
CALLS_PER_EXAMPLE = 60


class CountingMachine(SchedulerMachine):
    """The same machine, and what happened in it."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def teardown(self) -> None:
        """Drain, as the tests do, then count."""
        super().teardown()
        if not hasattr(self, "driver"):
            return
        driver, counts = self.driver, self.counts
        config = driver.config
        counts["schedulers"] += 1
        counts["steps"] += driver.num_steps
        counts["batches computed"] += len(driver.batches)
        counts[f"steps with lag {driver.max_lag}"] += driver.num_steps
        counts["steps without prefix cache"] += 0 if config.enable_prefix_cache else driver.num_steps
        counts["steps without chunking"] += 0 if config.enable_chunked_prefill else driver.num_steps
        counts["steps in pools of at most 20 slots"] += driver.num_steps if config.num_slots <= 20 else 0
        counts["steps that raised"] += driver.num_failures
        counts["preemptions"] += driver.scheduler.stats().preemptions_total
        counts["cached prompt tokens"] += driver.scheduler.stats().cached_tokens_total
        for request_id, request in driver.requests.items():
            last = driver.last(request_id)
            counts["requests"] += 1
            counts["requests with a sibling"] += request.after_request_id is not None
            counts["requests with a priority"] += request.priority != 0
            counts[f"ended by {last.finish_reason if last.error is None else last.error.code}"] += 1


def main() -> None:
    """Run rounds until there are enough steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="round i uses seed + i")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    plan = settings(
        max_examples=EXAMPLES_PER_ROUND,
        stateful_step_count=CALLS_PER_EXAMPLE,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    started, num_rounds = time.perf_counter(), 0
    while counts["steps"] < args.steps:
        factory = seed(args.seed + num_rounds)(lambda: CountingMachine(counts))
        run_state_machine_as_test(factory, settings=plan)
        num_rounds += 1
        print(f"{counts['steps']} steps, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    report = {
        **describe_run(),
        "seconds": round(time.perf_counter() - started),
        "rounds": num_rounds,
        "breaches": 0,  # one would have ended the run
        "counts": dict(sorted(counts.items())),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
