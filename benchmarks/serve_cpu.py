#!/usr/bin/env python3
"""What the SERVE targets ask of the default model on a CPU: start, streams, shared prefix.

    python benchmarks/serve_cpu.py [--out benchmarks/results/serve_cpu.json] [server flags ...]

Starts `lightllm.server.api_server` as a user would, with the flags given, and talks HTTP to it. Every figure
is the median of `--repeat` runs on a server that has answered one request; the start is measured `--repeat`
times too.
"""

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
from machine import describe_run

PROMPT = "Tell me a short story about the number {} and a small boat."  # about 14 tokens


def start_server(flags: list[str]) -> tuple[subprocess.Popen[str], str]:
    """Start a server on a free port; returns it and its URL when the ready line is out."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lightllm.server.api_server", "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.match(r"ready: (http://\S+) ", line)
    if found is None:
        raise SystemExit(f"the server did not start: {line!r}")
    return process, found[1]


def stop_server(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)


def measure_start(flags: list[str]) -> float:
    """Seconds from process start to the first whole answer."""
    began = time.perf_counter()
    process, url = start_server(flags)
    reply = httpx.post(
        f"{url}/generate", json={"inputs": "What is AI?", "parameters": {"max_new_tokens": 1}}, timeout=60
    )
    took = time.perf_counter() - began
    assert reply.status_code == 200, reply.text
    stop_server(process)
    return took


def run_stream(url: str, inputs: str | list[int], num_tokens: int) -> dict[str, float]:
    """One greedy stream; `ttft` and `last` are seconds after sending."""
    body = {"inputs": inputs, "parameters": {"max_new_tokens": num_tokens, "ignore_eos": True}}
    began = time.perf_counter()
    stamps = []
    with httpx.stream("POST", f"{url}/generate_stream", json=body, timeout=300) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line.startswith("data:"):
                stamps.append(time.perf_counter() - began)
    assert len(stamps) == num_tokens, (len(stamps), num_tokens)
    return {"ttft": stamps[0], "last": stamps[-1]}


def measure_streams(url: str, num_streams: int, num_tokens: int, offset: int) -> dict[str, float]:
    """All streams at once; tokens per second from the first send to the last token."""
    results: list[dict[str, float]] = []
    prompts = [PROMPT.format(offset * 1000 + i) for i in range(num_streams)]
    threads = [
        threading.Thread(target=lambda p=p: results.append(run_stream(url, p, num_tokens))) for p in prompts
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - began
    assert len(results) == num_streams
    ttft = statistics.median(r["ttft"] for r in results)
    return {"tokens_per_s": num_streams * num_tokens / wall, "ttft_p50_ms": ttft * 1000}


def measure_prefix(url: str, offset: int) -> dict[str, float]:
    """TTFT of two requests that share 1,500 of their 1,503 tokens."""
    shared = [(7919 * (offset + 1) + 31 * i) % 40000 + 100 for i in range(1500)]
    first = run_stream(url, [*shared, 500, 501, 502], 1)["ttft"]
    second = run_stream(url, [*shared, 600, 601, 602], 1)["ttft"]
    return {"first_ttft_ms": first * 1000, "second_ttft_ms": second * 1000, "ratio": second / first}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args, flags = parser.parse_known_args()
    measure_start(flags)  # warms the page cache
    starts = [measure_start(flags) for _ in range(args.repeat)]
    process, url = start_server(flags)
    try:
        run_stream(url, "warm up", 8)
        result = {
            "start_to_first_answer_s": round(statistics.median(starts), 2),
            "streams_1": medians([measure_streams(url, 1, 64, i) for i in range(args.repeat)]),
            "streams_16": medians([measure_streams(url, 16, 64, 10 + i) for i in range(args.repeat)]),
            "shared_prefix_1500": medians([measure_prefix(url, i) for i in range(args.repeat)]),
        }
    finally:
        stop_server(process)
    report = {**describe_run(), "repeat": args.repeat, "result": result}
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
