"""What a step costs in the scheduler alone: no model, no sockets.

    python benchmarks/scheduler_cost.py [--repeat 30] [--out FILE.json] [--plot FILE.svg]

Prints one JSON object, all times in ms: schedule() and update() by number of running decode requests, with an
unused and with a full KV pool (slots must be evicted first); a whole turn of the engine's loop without the
model, but with codec and socket; the radix match of a 32k-token prompt by size of the tree, whose branches
all leave the prompt's own path; add() with many waiting. Medians of `--repeat` runs, and the best one, which
a busy machine spoils least.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import zmq
from machine import describe_run
from svg_plot import Panel, write_svg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightllm.engine.core import Engine
from lightllm.engine.executor import Executor, Pending
from lightllm.engine.link import ZmqLink
from lightllm.messages import EngineInfo, EngineRequest, ScheduledBatch, StepOutput
from lightllm.sampling_params import SamplingParams
from lightllm.scheduler.config import SchedulerConfig
from lightllm.scheduler.radix_tree import RadixTree
from lightllm.scheduler.scheduler import Scheduler
from lightllm.server.child import settle_memory

PROMPT_TOKENS = 64
MATCH_TOKENS = 32_768
REQUESTS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096)
ENGINE_REQUESTS = (1, 64, 256, 1024)
TREE_TOKENS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    settle_memory()  # as the engine process does
    report = {
        **describe_run(),
        "step_ms": [step_cost(n, args.repeat) for n in REQUESTS],
        "engine_step_ms": [engine_cost(n, args.repeat) for n in ENGINE_REQUESTS],
        "radix_match_32k_ms": [match_cost(n, args.repeat) for n in TREE_TOKENS],
        "add_ms": [add_cost(n) for n in (256, 4096)],
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", "utf-8")
    if args.plot:
        plot(args.plot, report)


def plot(path: Path, report: dict[str, object]) -> None:
    """Draw the growth curves, from the best runs."""
    steps, matches = report["step_ms"], report["radix_match_32k_ms"]
    by_pool = {
        name.replace("_", " "): [(step["num_running"], step[name]["both_best"]) for step in steps]
        for name in ("pool_unused", "pool_full")
    }
    by_size = {"match": [(match["tree_tokens"] - MATCH_TOKENS, match["best"]) for match in matches]}
    write_svg(
        path,
        [
            Panel("schedule() + update()", "running requests", "ms", by_pool, is_log=True, limit=("2 ms", 2)),
            Panel(
                "radix match of 32,768 tokens",
                "other tokens in the tree",
                "ms",
                by_size,
                is_log=True,
                limit=("1 ms", 1),
            ),
        ],
    )


def in_ms(duration_s: float) -> float:
    """Seconds as milliseconds, to 0.1 us."""
    return round(duration_s * 1e3, 4)


def timed(function: Callable[[], object], repeat: int) -> dict[str, float]:
    """Median and best duration of a call in ms."""
    durations = []
    for _ in range(repeat):
        started = time.perf_counter()
        function()
        durations.append(time.perf_counter() - started)
    return {"median": in_ms(statistics.median(durations)), "best": in_ms(min(durations))}


def result(batch: ScheduledBatch) -> StepOutput:
    """What a worker would answer."""
    token_ids = [[7] if is_sampling else [] for is_sampling in batch.is_sampling]
    return StepOutput(step_id=batch.step_id, token_ids=token_ids)


def step_cost(num_running: int, repeat: int) -> dict[str, object]:
    """One overlapped decode step at so many running requests."""
    # Room for one load and a little more: what the first load leaves behind is evicted by the second.
    num_slots = num_running * (PROMPT_TOKENS + repeat + 8) * 5 // 4 + 4 * PROMPT_TOKENS
    config = SchedulerConfig(
        num_slots=num_slots,
        max_running=num_running,
        batch_max_tokens=2 * PROMPT_TOKENS * num_running,  # all prompts in one step
        chunked_prefill_size=2 * PROMPT_TOKENS,
        max_req_total_len=num_slots,
        max_queued_requests=num_running,
    )
    scheduler = Scheduler(config)
    params = SamplingParams(max_new_tokens=2 * repeat, ignore_eos=True)
    rng = random.Random(1)

    def fill(num_requests: int) -> None:
        for i in range(num_requests):
            prompt = [rng.randrange(32_000) for _ in range(rng.randrange(1, 2 * PROMPT_TOKENS))]
            request = EngineRequest(request_id=f"r{i}", prompt_token_ids=prompt, sampling_params=params)
            assert scheduler.add(request, time.time()) is None

    def prefill() -> None:
        while scheduler.stats().requests_waiting:
            batch = scheduler.schedule(time.time())
            assert batch is not None
            scheduler.update(result(batch))

    def measure() -> dict[str, float]:
        schedule_s, update_s = [], []
        batch = scheduler.schedule(time.time())
        assert batch is not None
        for _ in range(repeat):
            answer = result(batch)
            started = time.perf_counter()
            batch = scheduler.schedule(time.time())
            scheduled = time.perf_counter()
            scheduler.update(answer)
            update_s.append(time.perf_counter() - scheduled)
            schedule_s.append(scheduled - started)
            assert batch is not None
        scheduler.update(result(batch))
        assert len(batch.rows) == num_running
        both_s = [a + b for a, b in zip(schedule_s, update_s, strict=True)]
        return {
            "schedule": in_ms(statistics.median(schedule_s)),
            "update": in_ms(statistics.median(update_s)),
            "both": in_ms(statistics.median(both_s)),
            "both_best": in_ms(min(both_s)),
        }

    fill(num_running)
    prefill()
    unused = measure()
    # Fill the pool with what nobody uses, then run the same load again.
    for request_id in list(scheduler.requests):
        scheduler.abort(request_id, "abort")
    fill(num_running)
    prefill()
    return {"num_running": num_running, "pool_unused": unused, "pool_full": measure()}


class NoModel(Executor):
    """Has the result of a step at once; its own time is measured, to be subtracted."""

    def __init__(self) -> None:
        self.own_s = 0.0

    def submit(self, batch: ScheduledBatch) -> Pending:
        """Make up the result, as a Future that is done."""
        started = time.perf_counter()
        done: Future[StepOutput] = Future()
        done.set_result(result(batch))
        self.own_s += time.perf_counter() - started
        return done

    def info(self) -> EngineInfo:
        """Not asked for here."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to free."""


def engine_cost(num_running: int, repeat: int) -> dict[str, object]:
    """One turn of the engine's loop, codec and socket included, at so many decode requests."""
    config = SchedulerConfig(
        num_slots=num_running * (2 * PROMPT_TOKENS + 4 * repeat),
        max_running=num_running,
        batch_max_tokens=PROMPT_TOKENS * num_running,
        chunked_prefill_size=PROMPT_TOKENS,
        max_req_total_len=PROMPT_TOKENS + 4 * repeat,
        max_queued_requests=num_running,
    )
    with tempfile.TemporaryDirectory() as folder:
        frontend = zmq.Context()
        inbox = frontend.socket(zmq.PULL)
        inbox.bind(f"ipc://{folder}/frontend")
        executor, link = NoModel(), ZmqLink(f"ipc://{folder}/engine", f"ipc://{folder}/frontend")
        engine = Engine(Scheduler(config), executor, link)
        for i in range(num_running):
            params = SamplingParams(max_new_tokens=3 * repeat, ignore_eos=True)
            prompt = [i, *range(PROMPT_TOKENS - 1)]
            request = EngineRequest(
                request_id=f"req_{i:032x}", prompt_token_ids=prompt, sampling_params=params
            )
            engine.scheduler.add(request, time.time())
        durations = []
        for step in range(repeat + 3):
            executor.own_s, started = 0.0, time.perf_counter()
            engine.step()
            duration_s = time.perf_counter() - started - executor.own_s
            if step >= 3:  # before it: the prompts, and the pipeline's first steps
                durations.append(duration_s)
                inbox.recv()
        link.close()
        frontend.destroy(linger=0)
    best, median = in_ms(min(durations)), in_ms(statistics.median(durations))
    return {"num_running": num_running, "median": median, "best": best}


def match_cost(tree_tokens: int, repeat: int) -> dict[str, object]:
    """Match of a 32k-token prompt that is in the tree, among `tree_tokens` others that share a beginning."""
    rng = random.Random(2)
    tree = RadixTree()
    prompt = array("i", (rng.randrange(32_000) for _ in range(MATCH_TOKENS)))

    def insert(token_ids: array) -> None:
        slots = array("i", range(1, len(token_ids) + 1))
        tree.lock(tree.root)
        tree.unlock(tree.insert(tree.root, token_ids, slots, 0, len(token_ids))[0])

    insert(prompt)
    while tree.num_tokens < tree_tokens + MATCH_TOKENS:
        shared = rng.randrange(MATCH_TOKENS)
        insert(prompt[:shared] + array("i", (rng.randrange(32_000) for _ in range(rng.randrange(1, 2000)))))
    assert len(tree.match(prompt, MATCH_TOKENS)[1]) == MATCH_TOKENS
    match = timed(lambda: tree.match(prompt, MATCH_TOKENS), repeat)
    return {"tree_tokens": tree.num_tokens, "nodes": len(list(tree.nodes())), **match}


def add_cost(num_waiting: int) -> dict[str, object]:
    """One more short request when so many are waiting."""
    config = SchedulerConfig(
        num_slots=4096,
        max_running=8,
        batch_max_tokens=512,
        chunked_prefill_size=256,
        max_req_total_len=4096,
        max_queued_requests=10 * num_waiting,
        schedule_policy="shortest_prefill",
    )
    scheduler = Scheduler(config)
    params = SamplingParams(max_new_tokens=64)
    names = iter(range(10 * num_waiting))

    def add() -> None:
        name = next(names)
        prompt = [name % 100, *range(PROMPT_TOKENS)]
        scheduler.add(
            EngineRequest(request_id=f"r{name}", prompt_token_ids=prompt, sampling_params=params), time.time()
        )

    for _ in range(num_waiting):
        add()
    return {"num_waiting": num_waiting, **timed(add, 100)}


if __name__ == "__main__":
    main()
