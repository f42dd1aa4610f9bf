"""Streamed tokens that one core of a pd_master forwards: fake nodes over real links, raw clients.

    python benchmarks/router_throughput.py [--streams 256] [--tokens 400] [--step_ms 5 2] [--route ROUTE]
    [--repeat 3] [--out benchmarks/results/router_throughput.json]

Three processes. One plays a prefill and a decode node: it registers over the authenticated WebSocket, grants
every reservation, hands every prompt over, and then sends one frame per step with a token for every stream.
The pd_master (router, node links, Generator, Detokenizer, SSE frames, uvicorn, uvloop) forwards them; the
client only reads. All threads of the master are bound to one core, nodes and client to the others.
`tokens_per_wall_s` with a --step_ms too short for the master is the most that the core can do.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from frontend_throughput import ROUTES, run_clients
from machine import describe_run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TOKEN = b"a token for this benchmark only"
TEXT = b"The quick brown fox jumps over the lazy dog. "


def run_nodes(port: int, streams: int, tokens: int, step_s: float) -> None:
    """Play both nodes until the last token is sent; print when the first step began."""
    from lightllm import messages
    from lightllm.cluster_link import Dialer, Welcome
    from lightllm.cluster_messages import (
        REGISTER_PATH,
        REGISTER_PURPOSE,
        NodeRecord,
        NodeReport,
        Registration,
        ToNode,
    )
    from lightllm.messages import (
        EngineInfo,
        EngineOutput,
        EngineRequest,
        EngineStats,
        KVReserved,
        RequestOutput,
    )
    from lightllm.node_link import Dialling, Link

    decoder = messages.decoder(ToNode)
    decoding: list[str] = []
    stats = EngineStats(kv_total_tokens=10**6)
    all_there = asyncio.Event()
    links: dict[str, Link] = {}

    class Player:
        """One node's end."""

        def __init__(self, role: str) -> None:
            self.role = role

        def on_open(self, link: Link, welcome: Welcome | None) -> None:
            links[self.role] = link

        def on_body(self, link: Link, body: bytes) -> None:
            match decoder.decode(body):
                case EngineRequest(request_id=request_id, recv_kv_from=source) if source is not None:
                    decoding.append(request_id)
                    link.send(KVReserved(request_id=request_id, num_cached_tokens=0))
                case EngineRequest(request_id=request_id):
                    first = RequestOutput(request_id=request_id, new_token_ids=[TEXT[0]])
                    last = RequestOutput(request_id=request_id, finish_reason="handed_over")
                    link.send(EngineOutput(outputs=[first, last], stats=stats))
                    self.num_done = getattr(self, "num_done", 0) + 1
                    if self.num_done == streams:
                        all_there.set()

        def on_closed(self, link: Link, reason: str) -> None:
            return

        def heartbeat(self, link: Link) -> NodeReport:
            return NodeReport(stats=stats)

    def registration(role: str) -> bytes:
        info = EngineInfo(
            device="none",
            dtype="none",
            kv_total_tokens=10**6,
            max_req_total_len=10**5,
            vocab_size=257,
            load_s=0,
            attention_backend="none",
        )
        record = NodeRecord(node_id=role, epoch=1, role=role, address="none")
        return messages.encode(Registration(record=record, info=info))

    async def main() -> None:
        dialling = [
            Dialling(
                "127.0.0.1",
                port,
                REGISTER_PATH,
                Player(role),
                lambda role=role: Dialer(TOKEN, REGISTER_PURPOSE, role, 1, registration(role)),  # type: ignore[misc]
                "pd_master",
            )
            for role in ("prefill", "decode")
        ]
        while len(links) < len(dialling):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        print("ready", flush=True)
        await all_there.wait()
        await asyncio.sleep(0.2)
        next_s = time.monotonic()
        print(next_s, flush=True)
        for step in range(1, tokens):
            reason = "length" if step == tokens - 1 else None
            ids = [TEXT[step % len(TEXT)]]
            outputs = [RequestOutput(request_id=i, new_token_ids=ids, finish_reason=reason) for i in decoding]
            links["decode"].send(EngineOutput(outputs=outputs, stats=stats))
            next_s += step_s
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
        await asyncio.sleep(30)  # until everything is read and this process is ended

    import uvloop

    uvloop.run(main())


def run_master(port_fd: int) -> None:
    """Serve on an inherited socket until stdin ends, then print the CPU seconds since the first token."""
    import uvicorn
    import uvloop

    from lightllm.api.app import create_app
    from lightllm.api.call import AppContext
    from lightllm.api.metrics import Metrics
    from lightllm.api.nodes import web_sockets
    from lightllm.api.protocol import uvicorn_config
    from lightllm.api.request_log import RequestLog
    from lightllm.config import Config
    from lightllm.frontend.generation import Generation
    from lightllm.frontend.generator import Generator
    from lightllm.frontend.node_server import NodeServer
    from lightllm.frontend.pd_router import PDRouter
    from lightllm.server.child import settle_memory
    from tests.fakes import byte_tokenizer

    cpu_s: list[float] = []

    class Observed(Metrics):
        """Notes when the last prompt was done."""

        def first_token(self, generation: Generation) -> None:
            super().first_token(generation)
            cpu_s.append(time.process_time())

    router = PDRouter(vocab_size=257, max_queued_requests=1024)
    nodes = NodeServer(router, TOKEN, node_id="pd_master", epoch=1)
    metrics = Observed("bench", "0", router)
    tokenizer = byte_tokenizer()
    context = AppContext(
        config=Config(),
        tokenizer=tokenizer,
        engine=router,
        generator=Generator(tokenizer, router, request_timeout_s=600, observer=metrics),
        metrics=metrics,
        model_names=["bench"],
        requests=RequestLog(10),
        version="0",
        cluster=nodes,
    )
    config = uvicorn_config(create_app(context), version="0", web_sockets=web_sockets(nodes))
    server = uvicorn.Server(config)

    async def main() -> None:
        router.start()
        await server.serve(sockets=[socket.socket(fileno=port_fd)])

    def stop() -> None:
        sys.stdin.read()
        server.should_exit = server.force_exit = True

    threading.Thread(target=stop, daemon=True).start()
    settle_memory()
    uvloop.run(main())
    used = {"cpu_s": time.process_time() - cpu_s[-1], "tokens": metrics.generated_tokens - len(cpu_s)}
    print(json.dumps(used))


def measure(streams: int, tokens: int, step_ms: float, route: str, core: int) -> dict[str, Any]:
    """One run of all three processes, the master on this core."""
    me = [sys.executable, str(Path(__file__).resolve())]
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listener.getsockname()[1]
    master = subprocess.Popen(
        [*me, "--role", "master", "--fd", str(listener.fileno())],
        pass_fds=[listener.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    os.sched_setaffinity(master.pid, {core})  # before it has any thread
    size = ["--streams", str(streams), "--tokens", str(tokens), "--step_ms", str(step_ms)]
    nodes = subprocess.Popen([*me, "--role", "nodes", "--port", str(port), *size], stdout=subprocess.PIPE)
    assert nodes.stdout is not None
    nodes.stdout.readline()
    client = run_clients(port, streams, tokens, route)
    output, _ = master.communicate(timeout=30)
    nodes.kill()
    started, _ = nodes.communicate()
    listener.close()
    used = json.loads(output)
    return {
        "route": route,
        "streams": streams,
        "step_ms": step_ms,
        "tokens_offered_per_s": round(streams / step_ms * 1000),
        "tokens": used["tokens"],
        "tokens_per_cpu_s": round(used["tokens"] / used["cpu_s"]),
        "cpu_us_per_token": round(used["cpu_s"] / used["tokens"] * 1e6, 2),
        "tokens_per_wall_s": round(used["tokens"] / (client["end_s"] - float(started))),
        "bytes_per_token": round(client["bytes"] / used["tokens"]),
    }


def main() -> int:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="per stream")
    parser.add_argument("--step_ms", type=float, nargs="+", default=[5.0, 2.0], help="time between two steps")
    parser.add_argument("--route", choices=sorted(ROUTES), action="append")
    parser.add_argument("--repeat", type=int, default=3, help="runs per route; the best one is shown")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--role", choices=("nodes", "master"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "nodes":
        run_nodes(args.port, args.streams, args.tokens, args.step_ms[0] / 1000)
        return 0
    if args.role == "master":
        run_master(args.fd)
        return 0
    core, *others = sorted(os.sched_getaffinity(0))
    if others:
        os.sched_setaffinity(0, others)
    runs = []
    for route in args.route or ["generate_stream"]:
        for step_ms in args.step_ms:
            tries = [measure(args.streams, args.tokens, step_ms, route, core) for _ in range(args.repeat)]
            runs.append(max(tries, key=lambda run: run["tokens_per_wall_s"]))
    text = json.dumps({**describe_run(), "best_of": args.repeat, "runs": runs}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
