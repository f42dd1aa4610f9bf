"""A whole PD cluster on this machine: pd_master, prefill node, decode node; one request; the end.

    python deploy/pd_demo.py [--prompt TEXT] [--tokens N] [-- FLAGS OF THE NODES]

Starts the three processes as a user would, waits until a prompt can be answered, streams one answer, shows
which node did what, and stops everything. The default model, on a CPU; free ports of loopback.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

READY = re.compile(r"ready: http://([0-9.]+):(\d+)")
START_LIMIT_S = 120.0
NODE_FLAGS = ["--max_total_token_num", "8192", "--max_req_total_len", "4096", "--running_max_req_size", "16"]


def start(*flags: str) -> "subprocess.Popen[str]":
    """Start one role on a free port."""
    command = [sys.executable, "-m", "lightllm.server.api_server", "--port", "0", "--log_level", "warning"]
    return subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)


def ready_port(process: "subprocess.Popen[str]", name: str) -> str:
    """Wait for the ready line and return its port."""
    assert process.stdout is not None
    line = process.stdout.readline()
    found = READY.match(line)
    if found is None:
        raise SystemExit(f"{name} did not start (exit {process.wait()})")
    print(f"{name:12}{line.strip()}")
    return found[2]


def get(url: str) -> Any:
    """The JSON at a URL."""
    request = urllib.request.Request(url, headers={"accept": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.load(reply)


def wait_for_pair(url: str) -> None:
    """Until the pd_master has a node of each role."""
    end = time.monotonic() + START_LIMIT_S
    while True:
        try:
            get(f"{url}/readiness")
            return
        except urllib.error.HTTPError as error:
            if time.monotonic() > end:
                raise SystemExit(f"not ready: {error.read().decode()}") from error
        time.sleep(0.2)


def ask(url: str, prompt: str, num_tokens: int) -> str:
    """Stream one answer to the terminal; returns the request's id."""
    body = {"inputs": prompt, "parameters": {"max_new_tokens": num_tokens}}
    request = urllib.request.Request(
        f"{url}/generate_stream",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    print(f"\n{prompt}", end="", flush=True)
    with urllib.request.urlopen(request, timeout=60) as reply:
        for line in reply:
            if line.startswith(b"data:"):
                frame = json.loads(line[5:])
                print(frame.get("token", {}).get("text", ""), end="", flush=True)
        print("\n")
        return str(reply.headers["x-request-id"])


def main() -> int:
    """Run the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default="What is AI?")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("flags", nargs="*", help="more flags of both nodes, behind --")
    args = parser.parse_args()
    processes = [start("--run_mode", "pd_master")]
    try:
        port = ready_port(processes[0], "pd_master")
        link = ["--pd_master_ip", "127.0.0.1", "--pd_master_port", port]
        roles = ("prefill", "decode")
        processes += [start("--run_mode", role, *link, *NODE_FLAGS, *args.flags) for role in roles]
        for role, process in zip(roles, processes[1:], strict=True):
            ready_port(process, role)
        url = f"http://127.0.0.1:{port}"
        wait_for_pair(url)
        request_id = ask(url, args.prompt, args.tokens)
        for node in get(f"{url}/debug/requests/{request_id}")["nodes"]:
            events = ", ".join(f"{event} {when % 1000:.3f}" for event, when in node["events"])
            print(f"{node['node']:28}{events}")
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=40) for process in processes]
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
