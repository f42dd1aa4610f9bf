"""A drill with real engines: a PD cluster whose nodes come, go, die and freeze under many streams.

Two pd_masters that nodes find through a config_server, prefill and decode nodes of a tiny random model, one
thread each (fleet.py); one trouble after another. Every token of every stream is compared with what a single
node has said to the same prompt. `benchmarks/pd_drill.py` runs it for minutes, `test_drill.py` briefly.
"""

import asyncio
import itertools
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.e2e.conftest import Server
from tests.e2e.fleet import OUTPUT_TOKENS, Fleet, Prompt, ask_one_node, describe_model, stream

SETTLE_S = 3.0
# pd.md: a lost node is made up for within 10 s. What the loaded machine itself takes is allowed for.
GAP_LIMIT_S = 10.0
SLOWNESS_S = 2.0
MAX_ERROR_SHARE = 0.01
TRANSFER_FIGURES = {
    "transfer_bytes_total": ("direction", "transport"),
    "transfers_total": ("direction", "outcome"),
    "transfer_failures_total": ("direction", "reason"),
}
TROUBLES = (
    *(("kill", "decode"), ("drain", "prefill"), ("freeze", "decode"), ("kill", "prefill")),
    *(("freeze engine", "decode"), ("drain", "decode"), ("kill engine", "prefill"), ("freeze", "prefill")),
    *(("kill engine", "decode"), ("freeze engine", "prefill"), ("kill frontend", "decode")),
)


class Plan(NamedTuple):
    """How long, how much, how hard. `think_s` is the mean pause of a stream between two requests."""

    seconds: float
    num_streams: int = 64
    think_s: float = 3.0
    num_prompts: int = 160
    seed: int = 0
    num_prefill: int = 2
    num_decode: int = 3


# ------------------------------------------------------------ clients


class Tally:
    """How requests ended, and how long their clients had to wait."""

    def __init__(self) -> None:
        self.num_right = 0
        self.num_tokens = 0
        self.errors: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.gaps_s: list[float] = []
        self.first_s: list[float] = []
        self.whole_s: list[float] = []


async def client(
    port: int, prompts: list[Prompt], plan: Plan, number: int, tally: Tally, end_s: float
) -> None:
    """One stream after another until the time is over."""
    rng = random.Random(plan.seed * 1000 + number)
    while True:
        await asyncio.sleep(rng.expovariate(1 / plan.think_s))
        if time.monotonic() > end_s:
            return
        answer = await stream(port, rng.choice(prompts), rng.randint(*OUTPUT_TOKENS))
        tally.gaps_s.append(answer.gap_s)
        tally.whole_s.append(time.monotonic() - answer.began_s)
        tally.num_tokens += len(answer.token_ids)
        if answer.first_s:
            tally.first_s.append(answer.first_s)
        if answer.wrong:
            tally.wrong.append(answer.wrong)
        elif answer.error:
            tally.errors[answer.error] += 1
        else:
            tally.num_right += 1


def total(servers: list[Server], name: str, *labels: str) -> dict[str, float]:
    """A counter of /metrics, added up over everything but these labels."""
    found: Counter[str] = Counter()
    for server in servers:
        for line in server.client.get("/metrics").text.splitlines():
            if line.startswith(f"lightllm_{name}{{"):
                given = dict(re.findall(r'(\w+)="([^"]*)"', line))
                found[", ".join(given[label] for label in labels)] += float(line.rpartition(" ")[2])
    return dict(found)


# ------------------------------------------------------------ the drill


async def make_trouble(fleet: Fleet, plan: Plan, end_s: float, say: Callable[[str], None]) -> list[Any]:
    """One trouble after another; what was done, when, and how long it took until the fleet was whole."""
    rng, done, began_s = random.Random(plan.seed), [], time.monotonic()
    for kind, role in itertools.cycle(TROUBLES):
        await asyncio.sleep(SETTLE_S)
        if time.monotonic() > end_s:
            return done
        name = rng.choice([name for name in fleet.nodes if name.startswith(role)])
        start_s = time.monotonic()
        await asyncio.to_thread(fleet.trouble, kind, name)
        done.append([round(start_s - began_s, 1), kind, name, round(time.monotonic() - start_s, 1)])
        say(f"{done[-1]}")
    return done


async def run(folder: Path, plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Set up, make trouble under load, and look at what is left."""
    model, env = describe_model(folder)
    prompts = await asyncio.to_thread(ask_one_node, model, env, plan.num_prompts, plan.seed)
    say(f"{len(prompts)} prompts are answered by a single node")
    fleet = await asyncio.to_thread(Fleet, model, env)
    try:
        await asyncio.to_thread(fleet.start, ["prefill"] * plan.num_prefill + ["decode"] * plan.num_decode)
        say("the cluster is ready")
        tally, end_s = Tally(), time.monotonic() + plan.seconds
        ports = [int(master.url.rpartition(":")[2]) for master in fleet.masters]
        clients = [client(ports[i % 2], prompts, plan, i, tally, end_s) for i in range(plan.num_streams)]
        cpu_s, began_s = busy_s(), time.monotonic()
        troubles, *_ = await asyncio.gather(make_trouble(fleet, plan, end_s, say), *clients)
        result = report(plan, tally, troubles)
        result["cpu_load"] = round(
            (busy_s() - cpu_s) / (time.monotonic() - began_s) / (os.cpu_count() or 1), 2
        )
        result["left_over"] = await asyncio.to_thread(fleet.wait_idle)
        result["failovers"] = total(fleet.masters, "failovers_total", "reason")
        result["kv_transfers"] = {
            name: total(fleet.masters[:1], f"kv_{name}", *labels) for name, labels in TRANSFER_FIGURES.items()
        }
        result["log"] = fleet.remarks()
    finally:
        codes = await asyncio.to_thread(fleet.stop)
    result["exit_codes"] = codes
    return result


def busy_s() -> float:
    """CPU seconds that this machine has worked since it began."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def report(plan: Plan, tally: Tally, troubles: list[Any]) -> dict[str, Any]:
    """The figures of a run."""
    num_errors = sum(tally.errors.values())
    return {
        "plan": plan._asdict(),
        "requests": tally.num_right + num_errors + len(tally.wrong),
        "right": tally.num_right,
        "errors": dict(tally.errors),
        "wrong": tally.wrong[:20],
        "num_wrong": len(tally.wrong),
        "tokens": tally.num_tokens,
        "longest_wait_s": percentiles(tally.gaps_s),
        "first_token_s": percentiles(tally.first_s),
        "whole_request_s": percentiles(tally.whole_s),
        "troubles": troubles,
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Some of them."""
    ordered = sorted(values) or [0.0]
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)
        for name, share in shares.items()
    }


def breaches(result: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found = [f"wrong: {text}" for text in result["wrong"]]
    num_errors = sum(result["errors"].values())
    if num_errors > MAX_ERROR_SHARE * result["requests"]:
        found.append(f"{num_errors} of {result['requests']} requests ended in an error: {result['errors']}")
    if result["longest_wait_s"]["max"] > GAP_LIMIT_S + SLOWNESS_S:
        found.append(f"a client waited {result['longest_wait_s']['max']} s for a frame")
    found += [f"left over: {text}" for text in result["left_over"]]
    if any(result["exit_codes"]):
        found.append(f"exit codes {result['exit_codes']}")
    return found
