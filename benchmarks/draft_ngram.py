#!/usr/bin/env python3
"""What `--draft_ngram` brings a single stream of the default model on a CPU.

    python benchmarks/draft_ngram.py [--drafts 0,4,8] [--rounds 3] [--out FILE.json] [server flags ...]

One server for each number of drafts, all in the same run; the loads go round them in turns, so that a change
of the machine's speed meets all. `copy` continues a text that stands in the prompt, greedily; `story` is a
greedy answer; `sampled` is one at temperature 1, which repeats itself least. Prints tokens per second
(medians), and tokens per step: 1.0 without drafts. Texts must be the same.
"""

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
from machine import describe_run
from perplexity import TEXT
from serve_cpu import start_server, stop_server

NUM_TOKENS = 128


def prompts() -> dict[str, dict[str, Any]]:
    """Load -> fields of the request."""
    text = TEXT.read_text(encoding="utf-8")[20:1020]
    story = "<|im_start|>user\nTell me a story about a river and a mill.<|im_end|>\n<|im_start|>assistant\n"
    greedy: dict[str, Any] = {"do_sample": False}
    return {
        "copy": {"inputs": f"{text}\n\n{text[:60]}", "parameters": greedy},
        "story": {"inputs": story, "parameters": greedy},
        "sampled": {"inputs": story, "parameters": {"do_sample": True, "temperature": 1.0, "seed": 3}},
    }


def steps(url: str) -> float:
    """Decode steps so far."""
    text = httpx.get(f"{url}/metrics").text
    found = re.search(r'^lightllm_batch_size_count{[^}]*phase="decode"} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def run(url: str, request: dict[str, Any]) -> dict[str, Any]:
    """One stream; the time from the first token to the last."""
    parameters = {**request["parameters"], "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    stamps: list[float] = []
    text = ""
    before = steps(url)
    body = {"inputs": request["inputs"], "parameters": parameters}
    with httpx.stream("POST", f"{url}/generate_stream", json=body, timeout=300) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line.startswith("data:"):
                stamps.append(time.perf_counter())
                text += json.loads(line[5:])["token"]["text"]
    assert len(stamps) == NUM_TOKENS, len(stamps)
    per_step = (NUM_TOKENS - 1) / (steps(url) - before)
    return {"tokens_per_s": (NUM_TOKENS - 1) / (stamps[-1] - stamps[0]), "per_step": per_step, "text": text}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drafts", default="0,4,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args, flags = parser.parse_known_args()
    names = [f"draft_ngram {number}" for number in args.drafts.split(",")]
    servers = {name: start_server([*f"--{name}".split(), *flags]) for name in names}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    try:
        for number in range(args.rounds + 1):
            for load, request in prompts().items():
                for name, (_, url) in servers.items():
                    result = run(url, request)
                    if number:  # the first round fills the prefix cache
                        found.setdefault(load, {}).setdefault(name, []).append(result)
                texts = {runs[0]["text"] for runs in found.get(load, {}).values()}
                assert len(texts) <= 1, f"{load}: drafting changed the text: {texts}"
    finally:
        for process, _ in servers.values():
            stop_server(process)
    result: dict[str, Any] = {}
    for load, by_name in found.items():
        for name, runs in by_name.items():
            medians = {key: statistics.median(r[key] for r in runs) for key in ("tokens_per_s", "per_step")}
            result.setdefault(load, {})[name] = {key: round(value, 2) for key, value in medians.items()}
    report = {**describe_run(), "rounds": args.rounds, "tokens": NUM_TOKENS, "flags": flags, "result": result}
    print(json.dumps(report["result"], indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
