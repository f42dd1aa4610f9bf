#!/usr/bin/env python3
"""Several servers under the same loads in one run on one machine: what the CPU targets ask.

    python benchmarks/compare_cpu.py --server NAME=COMMAND ... [--out FILE.json] [--loads streams_1,...]

A command is started with {port} replaced; it must serve `/v1/completions`. Servers run one after the other,
in `--rounds` rounds, so that a change of the machine's speed meets all of them. Prompts are text and differ
within a run; tokens are those that `usage` reports, or the frames where a server reports none. Prints and
keeps JSON: medians over rounds, start to first answer, and the PSS of the server's process tree.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import time
from pathlib import Path

from machine import describe_run

WORDS = [
    "river",
    "stone",
    "light",
    "winter",
    "garden",
    "copper",
    "machine",
    "silver",
    "forest",
    "bread",
    "window",
    "paper",
    "morning",
    "engine",
]
# name -> (clients, requests, words of the prompt, output tokens); a word is about a token.
LOADS = {
    "streams_1": (1, 4, 0, 64),
    "streams_16": (16, 32, 0, 64),
    "streams_64": (64, 128, 0, 64),
    "prefill_2000": (1, 2, 1985, 2),
}


def prompt(number: int, num_words: int) -> str:
    """About 14 tokens, or `num_words` more; no two numbers share a beginning."""
    words = " ".join(
        WORDS[(number * 7 + i * (1 + number % 11) + i // 14) % len(WORDS)] for i in range(num_words)
    )
    return (
        f"{number} {words} tell me a short story about a small boat at sea."
        if num_words
        else (f"Number {number}: tell me a short story about a small boat.")
    )


async def run_request(
    port: int, model: str, text: str, num_tokens: int, banned: list[str]
) -> dict[str, float]:
    """One greedy stream over a connection of its own; times in seconds after sending."""
    body = {"model": model, "prompt": text, "max_tokens": num_tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    if banned:
        body["logit_bias"] = dict.fromkeys(banned, -100)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(head.encode() + data)
    status = await reader.readline()
    frames, tokens, first, last = 0, 0, 0.0, 0.0
    async for line in reader:
        if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
            continue
        frame = json.loads(line[5:])
        if frame.get("usage"):
            tokens = frame["usage"]["completion_tokens"]
        if frame.get("choices"):
            last = time.perf_counter() - began
            first = first or last
            frames += bool(frame["choices"][0].get("text"))
    writer.close()
    if b" 200 " not in status or not last:
        raise RuntimeError(f"no answer: {status!r}")
    return {"ttft": first, "last": last, "tokens": float(tokens or frames)}


async def run_load(port: int, model: str, load: str, offset: int, banned: list[str]) -> dict[str, float]:
    """A closed loop; tokens per second from the first send to the last byte."""
    clients, requests, num_words, num_tokens = LOADS[load]
    numbers, done = iter(range(offset, offset + requests)), []

    async def client() -> None:
        for number in numbers:
            done.append(await run_request(port, model, prompt(number, num_words), num_tokens, banned))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    wall = time.perf_counter() - began
    return {
        "tokens_per_s": sum(d["tokens"] for d in done) / wall,
        "ttft_p50_ms": statistics.median(d["ttft"] for d in done) * 1000,
        "tokens_each": statistics.mean(d["tokens"] for d in done),
    }


def process_tree(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for current in found:
        found += children.get(current, [])
    return found


def tree_pss_mib(pid: int) -> float:
    """Proportional set size of a process and all below it."""
    total = 0
    for current in process_tree(pid):
        try:
            for line in Path(f"/proc/{current}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except OSError:
            continue
    return round(total / 1024, 1)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def measure(command: str, model: str, loads: list[str], offset: int, banned: list[str]) -> dict[str, object]:
    """Start a server, run all loads, stop it."""
    port = free_port()
    began = time.perf_counter()
    process = subprocess.Popen(
        shlex.split(command.format(port=port)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while True:
            try:
                asyncio.run(run_request(port, model, "What is AI?", 2, banned))
                break
            except (OSError, RuntimeError, ValueError) as error:
                if process.poll() is not None or time.perf_counter() - began > 300:
                    raise SystemExit(f"{command}: no answer: {error}") from error
                time.sleep(0.05)
        result: dict[str, object] = {"start_to_first_answer_s": time.perf_counter() - began}
        asyncio.run(run_request(port, model, prompt(99_999, 0), 8, banned))
        for load in loads:
            result[load] = asyncio.run(run_load(port, model, load, offset, banned))
            offset += LOADS[load][1]
        result["pss_mib"] = tree_pss_mib(process.pid)
        return result
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def median_of(runs: list[dict[str, object]]) -> dict[str, object]:
    merged: dict[str, object] = {}
    for key, value in runs[0].items():
        values = [run[key] for run in runs]
        is_nested = isinstance(value, dict)
        merged[key] = median_of(values) if is_nested else round(statistics.median(values), 2)
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", action="append", required=True, metavar="NAME=COMMAND")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=MODEL", help="as its API calls it"
    )
    parser.add_argument(
        "--end_token",
        action="append",
        default=[],
        metavar="NAME=ID",
        help="of a server that does not obey ignore_eos: forbidden by a bias",
    )
    parser.add_argument("--loads", default="streams_1,streams_16", help=", ".join(LOADS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    servers = dict(pair.split("=", 1) for pair in args.server)
    models = dict(pair.split("=", 1) for pair in args.model)
    banned = {name: [p.split("=")[1] for p in args.end_token if p.startswith(f"{name}=")] for name in servers}
    runs: dict[str, list[dict[str, object]]] = {name: [] for name in servers}
    for round_number in range(args.rounds):
        for name, command in servers.items():
            model = models.get(name, "default_model_name")
            result = measure(command, model, args.loads.split(","), 1000 * round_number, banned[name])
            runs[name].append(result)
            print(name, json.dumps(result), flush=True)
    report = {**describe_run(), "loads": {name: LOADS[name] for name in args.loads.split(",")}}
    report |= {
        "servers": servers,
        "result": {name: median_of(found) for name, found in runs.items()},
        "runs": runs,
    }
    print(json.dumps(report["result"], indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
