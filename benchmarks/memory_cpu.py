#!/usr/bin/env python3
"""Memory of a server on a CPU: proportional set size (PSS) of all its processes, and what it consists of.

    python benchmarks/memory_cpu.py [--out benchmarks/results/memory_cpu.json] [server flags ...]

Starts the default model with room for 2,000 tokens of KV (or with the flags given), measures once it is
ready, after a prompt of 1,900 tokens has filled the KV, and after 16 streams. PSS counts a page that n
processes share as 1/n for each, so the sum over the tree is what the server takes; where other programs run
that use torch too, they carry a part of its libraries, and the sum of RSS is an upper bound.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from compare_cpu import process_tree
from machine import describe_run
from serve_cpu import measure_streams, run_stream, start_server, stop_server

FLAGS = ["--max_total_token_num", "2000"]
MIB = 1024


def kind_of(mapping: str) -> str:
    """A name for the group of mappings that this one belongs to."""
    name = Path(mapping).name
    if not mapping:
        return "anonymous"
    if mapping.startswith("["):
        return mapping.strip("[]")
    if "torch" in mapping or name.startswith(("libgomp", "libmkl")):
        return "torch's libraries"
    if name.endswith((".gguf", ".safetensors")):
        return "weight files"
    return "other files"


def by_kind(pid: int) -> dict[str, float]:
    """PSS of a process in MiB by kind of mapping, of which `private` was written by it."""
    sizes: Counter[str] = Counter()
    kind = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)", line)
        if head:
            kind = kind_of(head[1])
        elif line.startswith("Pss:"):
            sizes[kind] += int(line.split()[1])
        elif line.startswith("Private_Dirty:"):
            sizes["of it written by the process"] += int(line.split()[1])
    return {name: round(size / MIB, 1) for name, size in sizes.most_common() if size >= MIB // 2}


def measure(pid: int) -> dict[str, Any]:
    """PSS in MiB of each process of the tree, by kind, and the sum."""
    result: dict[str, Any] = {}
    total = total_rss = 0.0
    for child in process_tree(pid):
        command = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        label = next((word.rpartition(".")[2] for word in command if word.startswith("lightllm.")), "other")
        pss, rss = (field(child, "smaps_rollup", name) for name in ("Pss", "Rss"))
        peak = field(child, "status", "VmHWM")
        result[label] = {"pss_mib": pss, "rss_mib": rss, "peak_rss_mib": peak, **by_kind(child)}
        total, total_rss = total + pss, total_rss + rss
    return {"total_pss_mib": round(total, 1), "total_rss_mib": round(total_rss, 1), **result}


def field(pid: int, file: str, name: str) -> float:
    """A line of /proc/PID/FILE in MiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    assert found is not None, name
    return round(int(found[1]) / MIB, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    args, flags = parser.parse_known_args()
    flags = flags or FLAGS
    process, url = start_server(flags)
    try:
        result = {"ready": measure(process.pid)}
        run_stream(url, [(31 * i) % 40000 + 100 for i in range(1900)], 32)
        result["after a prompt of 1,900 tokens"] = measure(process.pid)
        measure_streams(url, 16, 64, 1)
        result["after 16 streams"] = measure(process.pid)
    finally:
        stop_server(process)
    report = {**describe_run(), "flags": flags, "result": result}
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
