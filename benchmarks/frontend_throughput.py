"""Streamed tokens that one frontend core forwards: a fake engine over zmq, the real frontend, raw clients.

    python benchmarks/frontend_throughput.py [--streams 256] [--tokens 400] [--step_ms 3 1] [--route ROUTE]
    [--repeat 3] [--out benchmarks/results/frontend_throughput.json]

Three processes. The engine sends one message per step with a token for every stream; the frontend
(EngineClient, Generator, Detokenizer, SSE frames, uvicorn, uvloop) forwards them; the client only reads. All
threads of the frontend are bound to one core, engine and client to the others. `tokens_per_wall_s` is what
the clients got; with a --step_ms too short for the frontend it is the most that the core can do.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_run
from stream_client import ROUTES, open_streams, read_polled

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def run_engine(folder: str, streams: int, tokens: int, step_s: float) -> None:
    """Wait for all requests, print the time, then send one token to each per step."""
    import zmq

    from lightllm import messages
    from lightllm.messages import (
        EngineOutput,
        EngineRequest,
        EngineStats,
        RequestOutput,
        ToEngine,
        TokenLogprobs,
    )

    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    outbox.setsockopt(zmq.SNDHWM, 0)
    inbox.bind(f"ipc://{folder}/engine")
    outbox.connect(f"ipc://{folder}/frontend")
    requests: list[EngineRequest] = []
    while len(requests) < streams:
        message = messages.decode(inbox.recv(), ToEngine)
        if isinstance(message, EngineRequest):
            requests.append(message)
    has_logprobs = requests[0].sampling_params.logprobs is not None
    text = b"The quick brown fox jumps over the lazy dog. "
    next_s = time.monotonic()
    print(next_s, flush=True)
    for step in range(tokens):
        reason = "length" if step == tokens - 1 else None
        outputs = [
            RequestOutput(
                request_id=request.request_id,
                new_token_ids=[text[step % len(text)]],
                logprobs=[TokenLogprobs(logprob=-0.523841)] if has_logprobs else None,
                finish_reason=reason,
            )
            for request in requests
        ]
        stats = EngineStats(
            requests_running=streams, steps_total=step + 1, step_phase="decode", step_duration_s=step_s
        )
        outbox.send(messages.encode(EngineOutput(outputs=outputs, stats=stats)))
        next_s += step_s
        time.sleep(max(0.0, next_s - time.monotonic()))
    inbox.poll(2000)  # until the frontend has read everything and this process is ended


def run_frontend(folder: str, port_fd: int) -> None:
    """Serve on an inherited socket until stdin ends, then print the CPU seconds since the first output."""
    import threading

    import uvicorn
    import uvloop

    from lightllm.api.app import create_app
    from lightllm.api.call import AppContext
    from lightllm.api.metrics import Metrics
    from lightllm.api.protocol import uvicorn_config
    from lightllm.api.request_log import RequestLog
    from lightllm.config import Config
    from lightllm.frontend.engine_client import EngineClient
    from lightllm.frontend.generator import Generator
    from lightllm.messages import EngineInfo, EngineStats, EngineUp
    from lightllm.server.child import settle_memory
    from tests.fakes import byte_tokenizer

    cpu_s: list[float] = []

    def on_stats(stats: EngineStats) -> None:
        cpu_s.append(time.process_time())
        metrics.step(stats)

    engine = EngineClient(on_stats)
    metrics = Metrics("bench", "0", engine)
    tokenizer = byte_tokenizer()
    context = AppContext(
        config=Config(),
        tokenizer=tokenizer,
        engine=engine,
        generator=Generator(tokenizer, engine, request_timeout_s=600, observer=metrics),
        metrics=metrics,
        model_names=["bench"],
        requests=RequestLog(10),
        version="0",
    )
    server = uvicorn.Server(uvicorn_config(create_app(context), version="0"))

    async def main() -> None:
        info = EngineInfo(
            device="cpu",
            dtype="float32",
            kv_total_tokens=10**6,
            max_req_total_len=10**5,
            vocab_size=257,
            load_s=0,
            attention_backend="none",
        )
        engine.connect(
            EngineUp(
                epoch=0, address=f"ipc://{folder}/engine", reply_address=f"ipc://{folder}/frontend", info=info
            )
        )
        await server.serve(sockets=[socket.socket(fileno=port_fd)])

    def stop() -> None:
        sys.stdin.read()
        server.should_exit = server.force_exit = True

    threading.Thread(target=stop, daemon=True).start()
    settle_memory()
    uvloop.run(main())
    print(json.dumps({"cpu_s": time.process_time() - cpu_s[0], "tokens": metrics.generated_tokens}))


def measure(streams: int, tokens: int, step_ms: float, route: str, core: int) -> dict[str, Any]:
    """One run of all three processes, the frontend on this core."""
    me = [sys.executable, str(Path(__file__).resolve())]
    with tempfile.TemporaryDirectory() as folder:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        common = [
            "--folder",
            folder,
            "--streams",
            str(streams),
            "--tokens",
            str(tokens),
            "--step_ms",
            str(step_ms),
        ]
        engine = subprocess.Popen([*me, "--role", "engine", *common], stdout=subprocess.PIPE)
        frontend = subprocess.Popen(
            [*me, "--role", "frontend", "--fd", str(listener.fileno()), *common],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        os.sched_setaffinity(frontend.pid, {core})  # before it has any thread
        answers = read_polled(open_streams([listener.getsockname()[1]], streams, tokens, route))
        output, _ = frontend.communicate(timeout=30)
        engine.kill()
        started, _ = engine.communicate()
        listener.close()
    used = json.loads(output)
    wall_s = answers.end_s - float(started)
    return {
        "route": route,
        "streams": streams,
        "step_ms": step_ms,
        "tokens_offered_per_s": round(streams / step_ms * 1000),
        "tokens": used["tokens"],
        "tokens_per_cpu_s": round(used["tokens"] / used["cpu_s"]),
        "cpu_us_per_token": round(used["cpu_s"] / used["tokens"] * 1e6, 2),
        "tokens_per_wall_s": round(used["tokens"] / wall_s),
        "bytes_per_token": round(answers.num_bytes / used["tokens"]),
        "frames": answers.num_frames,
    }


def main() -> int:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="per stream")
    parser.add_argument("--step_ms", type=float, nargs="+", default=[3.0, 1.0], help="time between two steps")
    parser.add_argument("--route", choices=sorted(ROUTES), action="append")
    parser.add_argument("--repeat", type=int, default=3, help="runs per route; the best one is shown")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--role", choices=("engine", "frontend"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "engine":
        run_engine(args.folder, args.streams, args.tokens, args.step_ms[0] / 1000)
        return 0
    if args.role == "frontend":
        run_frontend(args.folder, args.fd)
        return 0
    core, *others = sorted(os.sched_getaffinity(0))
    if others:
        os.sched_setaffinity(0, others)
    runs = []
    for route in args.route or sorted(ROUTES):
        for step_ms in args.step_ms:
            tries = [measure(args.streams, args.tokens, step_ms, route, core) for _ in range(args.repeat)]
            runs.append(max(tries, key=lambda run: run["tokens_per_wall_s"]))
    result = {**describe_run(), "best_of": args.repeat, "runs": runs}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
