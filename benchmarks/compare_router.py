"""A pd_master beside sglang-router (PD mode) under the same loads and clients, each on one core.

    python benchmarks/compare_router.py [--peer FOLDER] [--rounds 3]
    [--out benchmarks/results/compare_router.json]

FOLDER holds the peer's package (`pip install --no-deps --target FOLDER sglang-router==0.3.2`); without it the
pd_master alone is measured. Loads: more than either can forward; 51,200 tokens/s; and two moderate ones for
the time from the moment at which a node has a step's tokens to their arrival at the clients, which is also
measured without a router, the clients at the workers themselves. The routers take turns within a round.

The work is not the same: nodes send token ids to a pd_master, which detokenises them and writes the OpenAI
chunks; workers send those chunks, equally long, to the peer, which passes the bytes on.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from machine import describe_run
from router_run import Cores, Feeder, Load, Router, ended, master, measure, peer

ROUTE = "completions"
LOADS = {
    "most": Load(streams=256, tokens=500, step_ms=1.6),
    "51k": Load(streams=256, tokens=500, step_ms=5.0),
}
TIMED = {
    "64 streams x 30/s": Load(streams=64, tokens=100, step_ms=1000 / 30),
    "256 streams x 50/s, 8 nodes": Load(streams=256, tokens=100, step_ms=20.0, decode_nodes=8),
}


def ours(load: Load, cores: Cores, *, is_timed: bool) -> dict[str, Any]:
    """One run through a pd_master."""
    with master(cores.routers[0]) as router:
        arguments = ["--master", f"127.0.0.1:{router.port}", *load.arguments()]
        feeder = Feeder("fake_nodes.py", arguments, cores.nodes)
        with ended(feeder.process):
            assert feeder.line() == ["ready"]
            return measure([router], feeder, load, cores, route=ROUTE, is_timed=is_timed)


def theirs(load: Load, cores: Cores, folder: str, *, is_timed: bool) -> dict[str, Any]:
    """One run through the peer."""
    feeder = Feeder("fake_workers.py", load.arguments(), cores.nodes)
    with ended(feeder.process):
        _, *ports = feeder.line()
        with peer(cores.routers[0], folder, ports) as router:
            return measure([router], feeder, load, cores, route=ROUTE, is_timed=is_timed)


def direct(load: Load, cores: Cores) -> dict[str, Any]:
    """One run without a router; the workers run on the core where it would be."""
    feeder = Feeder("fake_workers.py", load.arguments(), set(cores.routers))
    with ended(feeder.process):
        _, _, *ports = feeder.line()
        workers = [Router(None, int(port)) for port in ports]
        return measure(workers, feeder, load, cores, route=ROUTE, is_timed=True)


def run_round(cores: Cores, folder: str | None) -> dict[str, dict[str, Any]]:
    """Every load through every router once: load -> router -> figures."""
    found: dict[str, dict[str, Any]] = {}
    for name, load in {**LOADS, **TIMED}.items():
        is_timed = name in TIMED
        found[name] = {"pd_master": ours(load, cores, is_timed=is_timed)}
        if folder is not None:
            found[name]["sglang-router"] = theirs(load, cores, folder, is_timed=is_timed)
        if is_timed:
            found[name]["no router"] = direct(load, cores)
    return found


def median(values: list[Any]) -> Any:
    """Of numbers, or of each entry of dictionaries."""
    if isinstance(values[0], dict):
        return {name: median([value[name] for value in values]) for name in values[0]}
    return round(statistics.median(values), 3)


def table(found: dict[str, dict[str, Any]]) -> str:
    """For people, as Markdown."""
    names = list(found["most"])
    rows = [
        ["tokens/s at most", *(f"{found['most'][name]['tokens_per_s']:,.0f}" for name in names)],
        ["CPU us/token at most speed", *(f"{found['most'][name]['cpu_us_per_token']:.1f}" for name in names)],
        ["CPU us/token at 51,200/s", *(f"{found['51k'][name]['cpu_us_per_token']:.1f}" for name in names)],
        ["tokens/s of 51,200 offered", *(f"{found['51k'][name]['tokens_per_s']:,.0f}" for name in names)],
    ]
    for load in TIMED:
        without = found[load]["no router"]["latency_ms"]
        for cut in without:
            times = [found[load][name]["latency_ms"][cut] for name in names]
            cells = [f"{time_ms:.3f} (+{time_ms - without[cut]:.3f})" for time_ms in times]
            rows.append([f"{load}: ms to the client, {cut} (without: {without[cut]:.3f})", *cells])
    head = ["", *names]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def main() -> int:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", help="folder with the package sglang_router")
    parser.add_argument("--rounds", type=int, default=3, help="their medians are shown")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    cores = Cores.shared(1)
    rounds = [run_round(cores, args.peer) for _ in range(args.rounds)]
    result = median(rounds)
    print(table(result))
    if args.out:
        text = json.dumps({**describe_run(), "median": result, "rounds": rounds}, indent=1)
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
