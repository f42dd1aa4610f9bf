"""One model on several GPUs: time of a token, throughput and loading, for several numbers of ranks.

    python benchmarks/ranks_cuda.py --model_dir FOLDER --ranks 1 2 2/2 [--out FILE] [server flags ...]

Starts `lightllm.server.api_server` as a user would, one after the other: `2` is --tp 2; `2/2` is --tp 2 over
two servers of one GPU each, whose sums go through sockets as they would between two machines. `lightllm
bench` then sends, after a round to warm up: one client with 512 tokens in and 256 out, and 64 clients with
256 in and 256 out. The model's vocabulary must hold all ids of the tokenizer.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from machine import describe_run

LOADS = {
    "warm": ("--num_clients", "64", "--input_num", "256", "--input_len", "256", "--output_len", "24"),
    "1 client": ("--num_clients", "1", "--input_num", "5", "--input_len", "512", "--output_len", "256"),
    "64 clients": ("--num_clients", "64", "--input_num", "192", "--input_len", "256", "--output_len", "256"),
}
# As between two machines: neither NVLink nor PCIe nor shared memory.
SOCKETS_ONLY = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
}
REMARKABLE = re.compile(r"sums |sum of |read .* GB of weights|memory: ")
START_LIMIT_S = 240.0
NCCL_PORT = "28801"


class Server:
    """One or several processes that are one server."""

    def __init__(self, ranks: str, flags: list[str]) -> None:
        tp, _, nnodes = ranks.partition("/")
        self.began = time.perf_counter()
        self.log: list[str] = []
        self.url = ""
        self.ready_s = 0.0
        self._is_ready = threading.Event()
        self.processes: list[subprocess.Popen[str]] = []
        for node in range(int(nnodes or 1)):
            more, environment = [], {}
            if nnodes:
                more = ["--nnodes", nnodes, "--node_rank", str(node), "--nccl_host", "127.0.0.1"]
                more += ["--nccl_port", NCCL_PORT]
                environment = {**SOCKETS_ONLY, "CUDA_VISIBLE_DEVICES": str(node)}
            http = ["--port", "0"] if node == 0 else []
            command = [sys.executable, "-m", "lightllm.server.api_server", "--tp", tp, *http, *more, *flags]
            process = subprocess.Popen(
                [*command, "--log_level", "debug"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **environment},
            )
            self.processes.append(process)
            threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.log.append(line.rstrip())
            found = re.match(r"ready: (http://\S+) ", line)
            if found:
                self.url, self.ready_s = found[1], time.perf_counter() - self.began
                self._is_ready.set()
        self._is_ready.set()

    def wait(self) -> None:
        """Until it is ready; raises RuntimeError with its last words if it does not become so."""
        self._is_ready.wait(START_LIMIT_S)
        if not self.url:
            raise RuntimeError("it did not become ready: " + " | ".join(self.log[-5:])[-800:])

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()

    def remarks(self) -> list[str]:
        """What it says of sums, memory and loading."""
        words = [line.partition(": ")[2] for line in self.log if REMARKABLE.search(line)]
        return list(dict.fromkeys(words))


def run_load(url: str, flags: tuple[str, ...]) -> dict[str, Any]:
    """What `lightllm bench` reports, in short."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, "-m", "lightllm", "bench", "--url", url, *flags, "--fixed_output_len"]
        run = subprocess.run(
            [*command, "--dump_file", str(path)], capture_output=True, text=True, check=False
        )
        if not path.exists():
            raise RuntimeError(f"the load ended with code {run.returncode}: {run.stderr[-400:]}")
        found = json.loads(path.read_text())
    if found["failures"]:
        raise RuntimeError(f"requests failed: {found['failures']}; {run.stderr[-400:]}")
    return {
        "requests": found["request_num"],
        "output_tokens_per_s": round(found["Output Throughput"], 1),
        "ttft_p50_s": round(found["first_token_time_dict"]["P50"], 4),
        "token_p50_ms": round(found["decode_token_time_dict"]["P50"], 3),
    }


def measure(ranks: str, flags: list[str], skipped: list[str]) -> dict[str, Any]:
    """All loads on one server; what went wrong is part of the result."""
    result: dict[str, Any] = {}
    server = Server(ranks, flags)
    try:
        server.wait()
        result["ready_s"] = round(server.ready_s, 1)
        for name, load in LOADS.items():
            if name not in skipped:
                result[name] = run_load(server.url, load)
                print(f"{ranks}: {name}: {result[name]}", flush=True)
    except RuntimeError as error:
        result["error"] = str(error)
        print(f"{ranks}: {error}", flush=True)
    finally:
        server.stop()
    result["log"] = server.remarks()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", nargs="+", default=["1", "2"])
    parser.add_argument("--skip", nargs="*", default=[], choices=list(LOADS), help="loads to leave out")
    parser.add_argument("--title", default="", help="of these figures in the file, which may hold others")
    parser.add_argument("--out", type=Path)
    args, flags = parser.parse_known_args()
    found: dict[str, Any] = {}
    for ranks in args.ranks:
        found[ranks] = measure(ranks, flags, args.skip)
    for ranks, result in found.items():
        for line in result["log"]:
            print(f"{ranks}: {line}")
    print(
        f"\n{'ranks':>6} {'ready s':>8} {'1 client, ms/token':>19} {'64 clients, ms/token':>21} "
        f"{'tokens/s':>9}"
    )
    for ranks, result in found.items():
        one, many = result.get("1 client", {}), result.get("64 clients", {})
        cells = (result.get("ready_s"), one.get("token_p50_ms"), many.get("token_p50_ms"))
        print(
            f"{ranks:>6} {cells[0]!s:>8} {cells[1]!s:>19} {cells[2]!s:>21} "
            f"{many.get('output_tokens_per_s')!s:>9}"
        )
    if args.out is not None:
        kept = json.loads(args.out.read_text()) if args.out.exists() else {}
        kept[args.title or "figures"] = {**describe_run(), "ranks": found}
        args.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
