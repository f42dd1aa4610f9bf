"""One measurement of a router between fake nodes and clients; used by the router benchmarks.

Every part is a process: the router on a core of its own, nodes on others, the clients here. CPU time is what
the kernel counts for the router's process from the first step to the end of the last stream.
"""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_client import Answers, arrivals, open_streams, read_polled, read_timed

HERE = Path(__file__).resolve().parent
START_LIMIT_S = 60.0
# Steps whose latency does not count: the machine warms up.
WARM_UP_STEPS = 10
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# The peer by its own interface, without the packages that only its command line needs.
PEER = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
from sglang_router.router_args import RouterArgs
from sglang_router.router import Router
port, metrics, prefill, *decode = [int(x) for x in sys.argv[2:]]
args = RouterArgs(
    host="127.0.0.1", port=port, prometheus_port=metrics, policy="round_robin", log_level="error",
    pd_disaggregation=True, prefill_urls=[(f"http://127.0.0.1:{prefill}", None)],
    decode_urls=[f"http://127.0.0.1:{x}" for x in decode],
)
args._validate_router_args()
Router.from_args(args).start()
"""


@dataclass(frozen=True)
class Load:
    """What the nodes send.

    Attributes:
        streams: of all masters together.
        tokens: per stream, one of which comes from the prefill node.
        step_ms: between two steps of a decode node; the steps of several are spread over that time.
    """

    streams: int = 256
    tokens: int = 400
    step_ms: float = 5.0
    decode_nodes: int = 1

    @property
    def offered_per_s(self) -> int:
        """Tokens per second that the nodes send."""
        return round(self.streams / self.step_ms * 1000)

    def arguments(self) -> list[str]:
        """For `fake_nodes` and `fake_workers`."""
        values = {
            "--streams": self.streams,
            "--tokens": self.tokens,
            "--step_ms": self.step_ms,
            "--decode_nodes": self.decode_nodes,
        }
        return [str(word) for pair in values.items() for word in pair]


@dataclass
class Router:
    """A running router."""

    process: subprocess.Popen[bytes] | None
    port: int

    def cpu_s(self) -> float:
        """CPU time of all its threads so far."""
        if self.process is None:
            return 0.0
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK_S


class Feeder:
    """Running fake nodes or workers."""

    def __init__(self, script: str, arguments: list[str], cores: set[int]) -> None:
        self.process = _spawn([sys.executable, str(HERE / script), *arguments])
        os.sched_setaffinity(self.process.pid, cores)

    def line(self) -> list[str]:
        """The words of what it says next."""
        assert self.process.stdout is not None
        words = self.process.stdout.readline().decode().split(" ")
        if not words[0]:
            raise SystemExit("the fake nodes have ended")
        return [word.strip() for word in words]


def physical_cores() -> list[int]:
    """The cores we may use, one of each pair that shares execution units."""
    chosen: dict[str, int] = {}
    for core in sorted(os.sched_getaffinity(0)):
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        chosen.setdefault(path.read_text() if path.exists() else str(core), core)
    return list(chosen.values())


@dataclass(frozen=True)
class Cores:
    """Who runs where.

    Attributes:
        are_clients_alone: they share no core with nodes, so they may wait without sleep.
    """

    routers: list[int]
    nodes: set[int]
    are_clients_alone: bool

    @classmethod
    def shared(cls, num_routers: int) -> "Cores":
        """A core for each router, the others for nodes and for the clients, which are this process.

        It is bound to its cores here; where there are few, it shares them with the nodes.
        """
        cores = physical_cores()
        if len(cores) <= num_routers:
            cores = sorted(os.sched_getaffinity(0))
        routers, others = cores[:num_routers], cores[num_routers:] or cores
        half = len(others) // 2
        os.sched_setaffinity(0, others[half:])
        return cls(routers, set(others[:half] or others), half > 0)


@contextlib.contextmanager
def master(core: int, config_server: str | None = None, vocab_size: int = 257) -> Iterator[Router]:
    """A pd_master of ours; prompts may have ids below `vocab_size`."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        command = [sys.executable, str(HERE / "master_process.py"), "--fd", str(listener.fileno())]
        command += ["--core", str(core), "--vocab_size", str(vocab_size)]
        if config_server is not None:
            command += ["--config_server", config_server]
        process = _spawn(command, pass_fds=(listener.fileno(),))
        port = listener.getsockname()[1]
        with ended(process):
            yield Router(process, port)


@contextlib.contextmanager
def peer(core: int, folder: str, worker_ports: list[str]) -> Iterator[Router]:
    """An sglang-router, whose package lies in this folder, before these workers (prefill first)."""
    port, metrics = free_port(), free_port()
    command = [sys.executable, "-c", PEER, *(str(x) for x in (core, port, metrics)), *worker_ports]
    with tempfile.TemporaryFile() as log:
        path = os.pathsep.join((folder, os.environ.get("PYTHONPATH", "")))
        process = _spawn(command, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log)
        with ended(process):
            try:
                wait_ready(process, f"http://127.0.0.1:{port}/readiness")
            except SystemExit:
                log.seek(0)
                print(log.read().decode()[-2000:], file=sys.stderr)
                raise
            yield Router(process, port)


def measure(
    routers: list[Router], feeder: Feeder, load: Load, cores: Cores, *, route: str, is_timed: bool = False
) -> dict[str, Any]:
    """Run one load through routers that are up.

    Returns:
        Tokens per second that arrived, the routers' CPU time per token, and with `is_timed` the time from a
        node's send to the client in ms.
    """
    started: dict[str, Any] = {}

    def note_start() -> None:
        start_s = float(feeder.line()[1])
        time.sleep(max(0.0, start_s - time.monotonic()))
        started.update(at_s=start_s, cpu_s=[router.cpu_s() for router in routers])

    thread = threading.Thread(target=note_start, daemon=True)
    thread.start()
    clients = open_streams([router.port for router in routers], load.streams, load.tokens, route)
    answers = read_timed(clients, is_awake=cores.are_clients_alone) if is_timed else read_polled(clients)
    thread.join(timeout=1)
    cpu_s = [router.cpu_s() - before for router, before in zip(routers, started["cpu_s"], strict=True)]
    tokens = load.streams * (load.tokens - 1)  # the first ones came before the start
    result = {
        "tokens_offered_per_s": load.offered_per_s,
        "tokens_per_s": round(tokens / (answers.end_s - started["at_s"])),
        "cpu_us_per_token": round(sum(cpu_s) / tokens * 1e6, 2),
        "bytes_per_token": round(answers.num_bytes / tokens),
    }
    if is_timed:
        sent = json.loads(" ".join(feeder.line()))
        result["latency_ms"] = percentiles(latencies_ms(answers, sent))
    return result


def latencies_ms(answers: Answers, sent: dict[str, list[float]]) -> list[float]:
    """From a node's send to the client, of every token behind the warm-up.

    Args:
        sent: of fake nodes, the times of their steps by letter; empty for workers, whose texts are times.
    """
    found = []
    for pieces in answers.pieces:
        tokens = arrivals(pieces)
        if sent:
            steps = sent[tokens[1][1]]  # behind the `x` of the prefill node
            times = zip((at_s for at_s, _ in tokens[1:]), steps, strict=True)
        else:
            times = zip((at_s for at_s, _ in tokens), (float(text) for _, text in tokens), strict=True)
        found += [(at_s - sent_s) * 1000 for at_s, sent_s in list(times)[WARM_UP_STEPS:]]
    return found


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90 and p99."""
    cuts = statistics.quantiles(values, n=100)
    return {name: round(cuts[int(name[1:]) - 1], 3) for name in ("p50", "p90", "p99")}


@contextlib.contextmanager
def ended(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Have a process end with the block: by the end of its stdin, or else by a signal."""
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _spawn(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, **options},
    )


def wait_ready(process: "subprocess.Popen[bytes]", url: str) -> None:
    """Wait until a server answers there."""
    limit_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit_s and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit(f"no answer from {url} within {START_LIMIT_S:.0f} s")
