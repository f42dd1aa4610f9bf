"""Two pd_masters behind one config_server beside one: what the cluster forwards in all.

    python benchmarks/router_masters.py [--masters 1 2] [--streams 256] [--rounds 3]
    [--out benchmarks/results/router_masters.json]

The config_server is the real one. Masters list themselves there, the nodes (`fake_nodes`) follow the list and
register at each; every master has a core of its own and `--streams` streams, more than it can forward. Shows
something only where nodes and clients have cores of their own, too: on four or more.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fake_nodes import TOKEN
from machine import describe_run
from router_run import Cores, Feeder, Load, ended, free_port, master, measure, wait_ready


@contextlib.contextmanager
def config_server(core: int) -> Iterator[str]:
    """HOST:PORT of a config_server."""
    port = free_port()
    command = [sys.executable, "-m", "lightllm.server.api_server", "--run_mode", "config_server"]
    command += ["--config_server_host", "127.0.0.1", "--config_server_port", str(port)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "LIGHTLLM_CLUSTER_TOKEN": TOKEN.decode()},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.sched_setaffinity(process.pid, {core})
    try:
        wait_ready(process, f"http://127.0.0.1:{port}/readiness")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def run_once(num_masters: int, streams: int, tokens: int, cores: Cores) -> dict[str, Any]:
    """All masters under more than they can forward."""
    load = Load(streams=streams * num_masters, tokens=tokens, step_ms=streams / 160)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(config_server(min(cores.nodes)))
        routers = [stack.enter_context(master(core, directory)) for core in cores.routers[:num_masters]]
        arguments = ["--config_server", directory, "--masters", str(num_masters), *load.arguments()]
        feeder = Feeder("fake_nodes.py", arguments, cores.nodes)
        stack.enter_context(ended(feeder.process))
        assert feeder.line() == ["ready"]
        return measure(routers, feeder, load, cores, route="completions")


def main() -> int:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--masters", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--streams", type=int, default=256, help="per master")
    parser.add_argument("--tokens", type=int, default=800, help="per stream")
    parser.add_argument("--rounds", type=int, default=3, help="their medians are shown")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    cores = Cores.shared(max(args.masters))
    rounds = [
        {str(n): run_once(n, args.streams, args.tokens, cores) for n in args.masters}
        for _ in range(args.rounds)
    ]
    rates = {n: statistics.median(r[n]["tokens_per_s"] for r in rounds) for n in rounds[0]}
    first = next(iter(rates.values()))
    print("| pd_masters | tokens/s in all | of the first | CPU us/token |\n| --- | --- | --- | --- |")
    for n, rate in rates.items():
        cpu_us = statistics.median(r[n]["cpu_us_per_token"] for r in rounds)
        print(f"| {n} | {rate:,.0f} | {rate / first:.2f} | {cpu_us:.1f} |")
    if args.out:
        text = json.dumps({**describe_run(), "tokens_per_s": rates, "rounds": rounds}, indent=1)
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
