"""Servers that a benchmark starts: one log file each, none of their processes left at the end."""

import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lightllm.bench.http_client import HttpClient, parse_url

ROOT = Path(__file__).resolve().parent.parent
READY = re.compile(r"^ready: (http://\S+) .*$", re.MULTILINE)
MOVED = re.compile(r"KV of \S+: (sent|received) (\d+) bytes by (\w+) in ([\d.]+) s \((\d+) MB/s\)")
STOP_LIMIT_S = 20.0
GROUP_LIMIT_S = 5.0
CALL_LIMIT_S = 120.0


class Server:
    """One `lightllm.server.api_server` on a free port; all it says goes to `NAME.log`.

    Args:
        flags: without --port.
        env: beside that of this process.
    """

    def __init__(self, name: str, flags: list[str], env: dict[str, str], logs: Path) -> None:
        self.name, self.flags = name, flags
        self.log_path = logs / f"{name}.log"
        self.url = ""
        self.ready_s = 0.0
        self.ready_line = ""
        self._began_s = time.monotonic()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightllm.server.api_server", "--port", "0", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path, **env},
                start_new_session=True,  # all its processes can be ended as one group
            )

    async def wait_ready(self, limit_s: float) -> None:
        """Until it has said where it listens.

        Raises:
            RuntimeError: it has ended or the time is over; with the end of its log.
        """
        until_s = time.monotonic() + limit_s
        while True:
            found = READY.search(self.log())
            if found is not None:
                break
            code = self.process.poll()
            if code is not None or time.monotonic() > until_s:
                why = f"exit {code}" if code is not None else f"not ready within {limit_s:g} s"
                raise RuntimeError(f"{self.name}: {why}; its log ends: {self.log()[-1500:]}")
            await asyncio.sleep(0.1)
        self.url, self.ready_line = found[1], found[0]
        self.ready_s = round(time.monotonic() - self._began_s, 1)
        self.client = HttpClient(parse_url(self.url), timeout_s=CALL_LIMIT_S)

    async def wait_answers(self, path: str, limit_s: float) -> None:
        """Until a GET is answered by 200.

        Raises:
            RuntimeError: not within the time.
        """
        until_s = time.monotonic() + limit_s
        while (reply := await self.client.get(path)).status != 200:
            if time.monotonic() > until_s:
                raise RuntimeError(f"{self.name}: {path}: {reply.error_text()}")
            await asyncio.sleep(0.1)

    def log(self, start: int = 0) -> str:
        """What it has said so far, from a byte on."""
        with self.log_path.open("rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")

    def log_size(self) -> int:
        """Bytes of it."""
        return self.log_path.stat().st_size

    async def metric_sums(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The samples of one family of /metrics, by the values of these labels."""
        text = (await self.client.get("/metrics")).body.decode()
        sums: dict[tuple[str, ...], float] = {}
        for given, value in re.findall(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE):
            values = dict(re.findall(r'(\w+)="([^"]*)"', given))
            key = tuple(values.get(label, "") for label in labels)
            sums[key] = sums.get(key, 0.0) + float(value)
        return sums


def stop_all(servers: list[Server]) -> None:
    """End all of them: SIGTERM, and after a while SIGKILL for whatever is left of their groups. Blocks."""
    for server in servers:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
    until_s = time.monotonic() + STOP_LIMIT_S
    for server in servers:
        try:
            server.process.wait(max(0.1, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            server.process.kill()
        server.process.wait()
        _end_group(server.process.pid)


def _end_group(group: int) -> None:
    """Kill what is left of a group of processes, and wait a while until nothing is: GPUs are free then."""
    until_s = time.monotonic() + GROUP_LIMIT_S
    try:
        while time.monotonic() < until_s:
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.05)
    except (ProcessLookupError, PermissionError):
        pass  # nothing is left of it


class Transfers:
    """What a decode node has received since this was made: its metrics, and the line of each transfer.

    With several ranks there is a line from each of them, with its own part of the bytes.
    """

    def __init__(self, node: Server) -> None:
        self._node = node
        self._log_size = node.log_size()
        self._before: dict[str, dict[tuple[str, ...], float]] = {}

    FAMILIES = (
        ("bytes", "lightllm_kv_transfer_bytes_total", ("transport",)),
        ("ends", "lightllm_kv_transfers_total", ("transport", "outcome")),
        ("seconds", "lightllm_kv_transfer_duration_sum", ()),
        ("count", "lightllm_kv_transfer_duration_count", ()),
    )

    @classmethod
    async def begin(cls, node: Server) -> "Transfers":
        """From now on."""
        self = cls(node)
        self._before = await self._read()
        return self

    async def _read(self) -> dict[str, dict[tuple[str, ...], float]]:
        found = {}
        for key, name, labels in self.FAMILIES:
            sums = await self._node.metric_sums(name, "direction", *labels)
            found[key] = {label[1:]: value for label, value in sums.items() if label[0] == "received"}
        return found

    async def end(self) -> dict[str, object]:
        """Until now: counts, lanes, GB/s, ms; a rate is a transfer's bytes by its own time."""
        await asyncio.sleep(0.3)  # the last ones are reported with a later step
        after = await self._read()
        new = {
            key: {label: value - self._before[key].get(label, 0.0) for label, value in values.items()}
            for key, values in after.items()
        }
        lines = [
            (int(size), lane, int(rate) * 1e6)
            for way, size, lane, _, rate in MOVED.findall(self._node.log(self._log_size))
            if way == "received" and int(size) and int(rate)
        ]
        num_bytes, seconds = sum(new["bytes"].values()), new["seconds"].get((), 0.0)
        result: dict[str, object] = {
            "lanes": {label[0]: round(value / 1e6, 1) for label, value in new["bytes"].items() if value},
            "outcomes": {" ".join(label): int(value) for label, value in new["ends"].items() if value},
            "transfers": int(new["count"].get((), 0)),
            "mb": round(num_bytes / 1e6, 1),
            "seconds_summed": round(seconds, 5),
            "gb_per_s_mean": round(num_bytes / seconds / 1e9, 3) if seconds else None,
            "lines": len(lines),
        }
        if lines:
            rates = [rate / 1e9 for _, _, rate in lines]
            times = [size / rate * 1e3 for size, _, rate in lines]
            result |= {
                "gb_per_s_p50": round(statistics.median(rates), 3),
                "gb_per_s_best": round(max(rates), 3),
                "ms_p50": round(statistics.median(times), 2),
                "ms_best": round(min(times), 2),
            }
        return result
