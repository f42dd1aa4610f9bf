"""Nodes of a PD cluster with real engines are killed, drained, frozen and added under load, for minutes.

    python benchmarks/pd_drill.py [--seconds 300] [--streams 64] [--out FILE.json]

Two pd_masters, a config_server, two prefill and three decode nodes of a tiny random model, one thread each.
The cluster, the troubles and what is checked stand in tests/e2e/drill.py: each token of each stream must be
what a single node says, at most one request of a hundred may end in an error, no client may wait longer than
docs/pd.md allows, and in the end no node may hold any KV. Exit 1 with the list of what was not so.

The model is tiny, and streams pause between two requests, because what is tried is not speed: two cores carry
some twenty processes, among them one or two that are just starting.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.e2e import drill


def main() -> int:
    """Run, judge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan = drill.Plan(seconds=300)
    parser.add_argument("--seconds", type=float, default=plan.seconds)
    parser.add_argument("--streams", type=int, default=plan.num_streams)
    parser.add_argument("--think", type=float, default=plan.think_s, help="mean pause of a stream, seconds")
    parser.add_argument("--prompts", type=int, default=plan.num_prompts)
    parser.add_argument("--seed", type=int, default=plan.seed)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    described = describe_run()
    plan = drill.Plan(args.seconds, args.streams, args.think, args.prompts, args.seed)
    began_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began_s:6.1f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(drill.run(Path(folder), plan, say))
    problems = drill.breaches(result)
    text = json.dumps({**described, "breaches": problems, **result}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", "utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
