"""Streamed tokens that one core of a pd_master forwards: fake nodes over real links, raw clients.

    python benchmarks/router_throughput.py [--streams 256] [--tokens 600] [--step_ms 5 1.6] [--route ROUTE]
    [--repeat 5] [--out benchmarks/results/router_throughput.json]

`fake_nodes` sends one frame per step with a token for every stream; a pd_master (`master_process`: router,
node links, Generator, Detokenizer, SSE frames, uvicorn, uvloop) on a core of its own forwards them;
`stream_client` only reads. `tokens_per_s` with a --step_ms too short for the master is the most that the core
can do.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from machine import describe_run
from router_run import Cores, Feeder, Load, ended, master, measure
from stream_client import ROUTES


def run_once(load: Load, route: str, cores: Cores) -> dict[str, Any]:
    """One run of all processes."""
    with master(cores.routers[0]) as router:
        arguments = ["--master", f"127.0.0.1:{router.port}", *load.arguments()]
        feeder = Feeder("fake_nodes.py", arguments, cores.nodes)
        with ended(feeder.process):
            assert feeder.line() == ["ready"]
            return measure([router], feeder, load, cores, route=route)


def main() -> int:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=600, help="per stream")
    parser.add_argument("--step_ms", type=float, nargs="+", default=[5.0, 1.6], help="time between two steps")
    parser.add_argument("--decode_nodes", type=int, default=1)
    parser.add_argument("--route", choices=sorted(ROUTES), action="append")
    parser.add_argument("--repeat", type=int, default=5, help="runs per load; their median is shown")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    cores = Cores.shared(1)
    runs = []
    for route in args.route or ["generate_stream"]:
        for step_ms in args.step_ms:
            load = Load(args.streams, args.tokens, step_ms, args.decode_nodes)
            tries = [run_once(load, route, cores) for _ in range(args.repeat)]
            median = {name: statistics.median(run[name] for run in tries) for name in tries[0]}
            all_cpu = [run["cpu_us_per_token"] for run in tries]
            shape = {"route": route, "streams": load.streams, "step_ms": step_ms}
            runs.append({**shape, **median, "cpu_us_per_token_of_all": all_cpu})
    text = json.dumps({**describe_run(), "median_of": args.repeat, "runs": runs}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
