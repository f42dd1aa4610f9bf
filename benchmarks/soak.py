"""Mixed load on a real server for half an hour: does every request end, and does memory come back?

    python benchmarks/soak.py [--minutes 30] [--clients 24] [--seed 0] [--out FILE.json] [--plot FILE.svg]
    [server flags ...]

Starts `lightllm.server.api_server` on a tiny model with random weights and a pool so small that requests are
preempted. Clients send streams and whole answers on all generating routes, with random lengths, shared
beginnings, n > 1, deadlines and bad fields, and some leave at a random moment. Every second the resident
memory of each process and the server's own figures are sampled. At the end every request must have had
exactly one end, the KV pool must be empty, and memory must have stopped growing; else the exit code is 1.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from machine import describe_run
from svg_plot import Panel, write_svg

SERVER_FLAGS = (
    "--load_format", "dummy", "--max_total_token_num", "3000", "--max_req_total_len", "700",
    "--running_max_req_size", "24", "--max_queued_requests", "16",
)  # fmt: skip
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
METRICS = ("kv_used_tokens", "requests_running", "requests_waiting", "preemptions_total")
PREFIX_TOKENS = 200
MAX_POINTS = 600
IDLE_S = 10
# Memory is compared with that of the first part of the run, in which caches and rings fill.
WARM_SHARE = 0.25
MAX_GROWTH_MB = 10.0
READ_LIMIT_S = 120.0


# ---------------------------------------------------------------- one request


class Request:
    """A request to send, and what must come back.

    Attributes:
        kind: for the counts.
        n: samples that must end.
        status: what the server must answer.
        patience_s: leave after so long; None: stay to the end.
    """

    def __init__(self, rng: random.Random, prefixes: list[list[int]]) -> None:
        self.n = 1
        self.status = {200, 429}
        self.patience_s = rng.expovariate(1 / 0.15) if rng.random() < 0.25 else None
        prompt = _prompt(rng, prefixes)
        length = rng.choice((1, 2, 8, 30, 60, 120))
        make = rng.choice((self._native, self._native, self._chat, self._completions, self._bad))
        self.kind, self.path, self.body = make(rng, prompt, length)
        if rng.random() < 0.05 and self.kind != "bad":
            self.body["timeout_s"] = 0.05
            self.kind += ", deadline"
            self.status.add(504)

    def _native(self, rng: random.Random, prompt: list[int], length: int) -> tuple[str, str, dict[str, Any]]:
        parameters = {"max_new_tokens": length, "ignore_eos": rng.random() < 0.8, "do_sample": True}
        if rng.random() < 0.5:
            return "native stream", "/generate_stream", {"inputs": prompt, "parameters": parameters}
        self.n = rng.choice((1, 1, 3))
        parameters |= {"n": self.n, "return_details": rng.random() < 0.3}
        return "native", "/generate", {"inputs": prompt, "parameters": parameters}

    def _chat(self, rng: random.Random, prompt: list[int], length: int) -> tuple[str, str, dict[str, Any]]:
        text = " ".join(f"word{token_id}" for token_id in prompt[:60])
        self.n = rng.choice((1, 1, 2, 4))
        body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": length}
        body |= {"n": self.n, "stream": rng.random() < 0.7, "stop": ["zq"] if rng.random() < 0.3 else None}
        if rng.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 3}
        return "chat stream" if body["stream"] else "chat", "/v1/chat/completions", body

    def _completions(
        self, rng: random.Random, prompt: list[int], length: int
    ) -> tuple[str, str, dict[str, Any]]:
        prompts = [prompt] if rng.random() < 0.7 else [prompt, prompt[: max(1, len(prompt) // 2)]]
        samples = rng.choice((1, 1, 2))
        self.n = samples * len(prompts)
        body: dict[str, Any] = {"prompt": prompts, "n": samples, "max_tokens": length}
        body |= {"stream": rng.random() < 0.5, "ignore_eos": True, "echo": rng.random() < 0.1}
        return "completions stream" if body["stream"] else "completions", "/v1/completions", body

    def _bad(self, rng: random.Random, prompt: list[int], length: int) -> tuple[str, str, dict[str, Any]]:
        self.status = {400}
        parameters = rng.choice(({"max_new_tokens": 10**6}, {"temperature": -1}, {"top_p": "x"}, {"n": 0}))
        return "bad", "/generate", {"inputs": prompt, "parameters": parameters}


def _prompt(rng: random.Random, prefixes: list[list[int]]) -> list[int]:
    tail = [rng.randrange(100, 40_000) for _ in range(rng.choice((1, 5, 20, 100, 300)))]
    return tail if rng.random() < 0.5 else rng.choice(prefixes)[: rng.randrange(1, PREFIX_TOKENS)] + tail


async def send(port: int, request: Request) -> str:
    """Send one request and check its answer; returns how it ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    data = json.dumps(request.body).encode()
    head = (
        f"POST {request.path} HTTP/1.1",
        "host: soak",
        "connection: close",
        "content-type: application/json",
    )
    lines = "\r\n".join((*head, f"content-length: {len(data)}", "", "")).encode()
    writer.write(lines + data)
    try:
        async with asyncio.timeout(request.patience_s or READ_LIMIT_S):
            answer = await reader.read(-1)
    except TimeoutError:
        if request.patience_s is None:
            return "BROKEN: no end"
        return "left"
    finally:
        writer.transport.abort()
    return check(request, answer)


def check(request: Request, answer: bytes) -> str:
    """How an answer ended; BROKEN if it is not whole or has not exactly one end per sample."""
    head, _, body = answer.partition(b"\r\n\r\n")
    found = re.match(rb"HTTP/1.1 (\d+) ", head)
    if found is None:
        return f"BROKEN: no status line in {answer[:60]!r}"
    status = int(found[1])
    if status not in request.status:
        return f"BROKEN: status {status} for {request.kind}: {body[:200]!r}"
    if status != 200:
        return f"status {status}"
    if b"chunked" in head:
        has_failed = b'"error":{' in body
        if not body.endswith(b"0\r\n\r\n") and not has_failed:
            return f"BROKEN: {request.kind} was cut off"
        num_ends = len(re.findall(rb'"finish_reason":"', body))
        is_whole = num_ends == request.n or (has_failed and num_ends == 1)
        return ("error frame" if has_failed else "complete") if is_whole else f"BROKEN: {num_ends} ends"
    value = json.loads(body)
    reasons = [choice["finish_reason"] for choice in value["choices"]] if "choices" in value else []
    if not reasons:
        reasons = value["finish_reason"] if request.n > 1 else [value["finish_reason"]]
    return "complete" if len(reasons) == request.n and all(reasons) else f"BROKEN: ends {reasons}"


# ---------------------------------------------------------------- the server


def start_server(folder: Path, flags: list[str]) -> tuple[subprocess.Popen[str], int]:
    """Start a server on a free port, its log in `folder`; returns it and the port."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    process = subprocess.Popen(
        [sys.executable, "-m", "lightllm.server.api_server", "--model_dir", str(folder), "--port", "0",
         *SERVER_FLAGS, *flags],
        stdout=subprocess.PIPE,
        stderr=(folder / "log").open("w"),
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    found = re.match(r"ready: http://[^:]+:(\d+) ", process.stdout.readline())
    if found is None:
        raise SystemExit("the server did not start:\n" + (folder / "log").read_text()[-2000:])
    return process, int(found[1])


def processes(process: subprocess.Popen[str]) -> dict[str, int]:
    """Pids of the server's processes by name."""
    found = {"supervisor": process.pid}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        name = re.search(rb"lightllm\.server\.(\w+)_main", Path(f"/proc/{pid}/cmdline").read_bytes())
        if name is not None:
            found[name[1].decode()] = int(pid)
    return found


def rss_mb(pid: int) -> float:
    """Resident memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return round(int(found[1]) / 1024, 2) if found else 0.0


async def get(port: int, path: str) -> str:
    """The body of a GET."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: soak\r\nconnection: close\r\n\r\n".encode())
    async with asyncio.timeout(READ_LIMIT_S):
        answer = await reader.read(-1)
    writer.close()
    return answer.partition(b"\r\n\r\n")[2].decode()


async def sample(port: int, pids: dict[str, int], started_s: float) -> dict[str, float]:
    """Memory of every process and the server's own figures, now."""
    text = await get(port, "/metrics")
    values: dict[str, float] = {"t_s": round(time.monotonic() - started_s, 1)}
    for name in METRICS:
        found = re.search(rf"^lightllm_{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
        values[name] = float(found[1]) if found else -1.0
    return values | {f"{name}_rss_mb": rss_mb(pid) for name, pid in pids.items()}


# ---------------------------------------------------------------- the run


async def run(port: int, pids: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """Load the server, sample it, and look at what is left when the load has gone."""
    rng = random.Random(args.seed)
    prefixes = [[rng.randrange(100, 40_000) for _ in range(PREFIX_TOKENS)] for _ in range(6)]
    started_s = time.monotonic()
    end_s = started_s + 60 * args.minutes
    sent: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    samples = [await sample(port, pids, started_s)]

    async def client(own: random.Random) -> None:
        while time.monotonic() < end_s:
            request = Request(own, prefixes)
            sent[request.kind] += 1
            ends[await send(port, request)] += 1

    clients = [asyncio.create_task(client(random.Random(rng.random()))) for _ in range(args.clients)]
    while not all(task.done() for task in clients):
        await asyncio.sleep(1)
        samples.append(await sample(port, pids, started_s))
    await asyncio.gather(*clients)
    for _ in range(IDLE_S):
        await asyncio.sleep(1)
        samples.append(await sample(port, pids, started_s))
    live = json.loads(await get(port, "/debug/requests?state=live"))["requests"]
    metrics = await get(port, "/metrics")
    finishes = {m[1]: float(m[2]) for m in re.finditer(r'request_finish{.*reason="(\w+)"} (\S+)', metrics)}
    return {
        "requests": sum(sent.values()),
        "sent": dict(sorted(sent.items())),
        "ends": dict(sorted(ends.items())),
        "samples_finished_by_reason": finishes,
        "live_at_the_end": len(live),
        "memory_mb": {name: growth(samples, f"{name}_rss_mb") for name in pids},
        "kv_used_at_the_end": samples[-1]["kv_used_tokens"],
        "kv_used_peak": max(s["kv_used_tokens"] for s in samples),
        "preemptions": samples[-1]["preemptions_total"],
        "curve": thinned(samples),
    }


def growth(samples: list[dict[str, float]], name: str) -> dict[str, float]:
    """Memory before, after the first part, and at the end of a run; medians over 5 % of the samples."""
    values = [sample[name] for sample in samples]
    width = max(1, len(values) // 20)
    warm = int(len(values) * WARM_SHARE)
    early, late = statistics.median(values[warm : warm + width]), statistics.median(values[-width:])
    return {
        "start": values[0],
        "warm": early,
        "end": late,
        "grown": round(late - early, 2),
        "peak": max(values),
    }


def thinned(samples: list[dict[str, float]]) -> dict[str, list[float]]:
    """Columns of at most MAX_POINTS samples."""
    kept = samples[:: max(1, -(-len(samples) // MAX_POINTS))]
    return {name: [sample[name] for sample in kept] for name in samples[0]}


def breaches(result: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found = [f"{count} x {end}" for end, count in result["ends"].items() if end.startswith("BROKEN")]
    if result["live_at_the_end"]:
        found.append(f"{result['live_at_the_end']} requests are still live")
    if sum(result["ends"].values()) != result["requests"]:
        found.append(f"{result['requests']} requests, {sum(result['ends'].values())} ends")
    if result["kv_used_at_the_end"]:
        found.append(f"{result['kv_used_at_the_end']} KV tokens are still in use")
    for name, memory in result["memory_mb"].items():
        if memory["grown"] > MAX_GROWTH_MB:
            found.append(f"{name} has grown by {memory['grown']} MB after the first part")
    return found


def plot(path: Path, curve: dict[str, list[float]]) -> None:
    """Draw memory and KV over time."""
    minutes = [t / 60 for t in curve["t_s"]]

    def line(name: str) -> list[tuple[float, float]]:
        return list(zip(minutes, curve[name], strict=True))

    rss = {name.removesuffix("_rss_mb"): line(name) for name in curve if name.endswith("_rss_mb")}
    kv = {"kv_used_tokens": line("kv_used_tokens")}
    requests = {name: line(name) for name in ("requests_running", "requests_waiting")}
    write_svg(
        path,
        [
            Panel("resident memory", "minutes", "MB", rss),
            Panel("KV in use", "minutes", "tokens", kv),
            Panel("requests", "minutes", "requests", requests),
        ],
    )


def main() -> int:
    """Run, judge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args, flags = parser.parse_known_args()
    described = describe_run()
    with tempfile.TemporaryDirectory() as folder:
        process, port = start_server(Path(folder), flags)
        try:
            result = asyncio.run(run(port, processes(process), args))
        finally:
            process.terminate()
            process.wait(timeout=60)
        log = (Path(folder) / "log").read_text()
    problems = breaches(result)
    problems += [line for line in log.splitlines() if "ERROR" in line or "Traceback" in line][:20]
    report = {**described, "breaches": problems, "exit_code_of_server": process.returncode, **result}
    text = json.dumps({name: value for name, value in report.items() if name != "curve"}, indent=1)
    print(text)
    if args.out:
        curve = ",\n  ".join(f'"{name}": {json.dumps(column)}' for name, column in result["curve"].items())
        args.out.write_text(f'{text[:-2]},\n "curve": {{\n  {curve}\n }}\n}}\n', "utf-8")
    if args.plot:
        plot(args.plot, result["curve"])
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
