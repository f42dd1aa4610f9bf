"""A pd_master in the test's own event loop, and fake nodes as processes around it."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvicorn

from lightllm.api.app import create_app
from lightllm.api.nodes import web_sockets
from lightllm.api.protocol import uvicorn_config
from lightllm.frontend.node_agent import NodeAgent
from lightllm.frontend.node_server import NodeServer
from lightllm.frontend.pd_router import PDRouter
from tests.api.harness import make_context
from tests.fakes import FakeEngineClient
from tests.pd.fake_node import NodeOptions, token_of

ROOT = Path(__file__).parents[2]
TOKEN = "a token of tests, long enough"


def expected(prompt: str, num_tokens: int) -> str:
    """What any node, or several in turn, must answer."""
    ids = list(prompt.encode())
    return "".join(chr(token_of(ids, i)) for i in range(num_tokens))


class Cluster:
    """One pd_master and its nodes."""

    def __init__(self, router: PDRouter, port: int) -> None:
        self.router = router
        self.port = port
        self.nodes: dict[str, subprocess.Popen[str]] = {}
        self.agents: list[NodeAgent] = []
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def start(self, role: str, name: str, ports: list[int] | None = None, **options: Any) -> None:
        """Start a node of this master, or of several; `wait_for` it where that matters."""
        masters = [("127.0.0.1", port) for port in ports or [self.port]]
        config = NodeOptions(role=role, name=name, masters=masters, **options)
        text = msgspec.json.encode(config).decode()
        self.nodes[name] = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/pd/fake_node.py"), text],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def join(self, role: str, name: str, engine: FakeEngineClient) -> NodeAgent:
        """Have a node in this event loop, which is heard of some turns later; it leaves at the end."""
        agent = NodeAgent(
            engine,  # type: ignore[arg-type]
            TOKEN.encode(),
            node_id=name,
            epoch=1,
            role=role,
            address="x:1",
        )
        agent.follow({("127.0.0.1", self.port)})
        self.agents.append(agent)
        return agent

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.nodes[name].pid, number)

    async def wait_for(self, *names: str) -> None:
        """Until exactly these nodes are registered."""
        await until(lambda: {n.node_id for n in self.router.directory.all()} == set(names))

    async def ready(self) -> None:
        """Until KV has moved between two nodes."""
        await until(lambda: self.router.probes.is_any_ready)
        assert (await self.client.get("/readiness")).status_code == 200

    async def generate(self, prompt: str, num_tokens: int, **parameters: Any) -> httpx.Response:
        body = {"inputs": prompt, "parameters": {"max_new_tokens": num_tokens, **parameters}}
        return await self.client.post("/generate", json=body)

    async def stream(
        self, prompt: str, num_tokens: int, on_token: Callable[[int], None] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """All text of a stream, and its last frame."""
        body = {"inputs": prompt, "parameters": {"max_new_tokens": num_tokens}}
        text, last, count = "", {}, 0
        async with self.client.stream("POST", "/generate_stream", json=body) as reply:
            assert reply.status_code == 200, await reply.aread()
            async for line in reply.aiter_lines():
                if not line.startswith("data:"):
                    continue
                last = json.loads(line[5:])
                if "token" in last:
                    text += last["token"]["text"]
                    count += 1
                    if on_token is not None:
                        on_token(count)
        return text, last

    async def idle(self) -> None:
        """Until nothing runs anywhere: no request, no leg, no KV in use."""
        end = time.monotonic() + 12
        while busy := self._busy():
            assert time.monotonic() < end, f"still busy: {busy}"
            await asyncio.sleep(0.01)

    def _busy(self) -> list[str]:
        """What is not at its base."""
        found = [f"{len(self.router._legs)} legs"] if self.router._legs else []
        found += [f"{self.router.num_live} requests"] if self.router.num_live else []
        for node in self.router.directory.all():
            figures = (len(node.legs), node.promised_tokens, node.queued_tokens, node.stats.kv_used_tokens)
            if any(figures):
                found.append(f"{node.node_id}: legs, promised, queued, KV = {figures}")
        return found


async def until(condition: Callable[[], bool], limit_s: float = 12) -> None:
    """Poll until a condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def cluster(**server: Any) -> AsyncIterator[Cluster]:
    """A pd_master on a free port of loopback."""
    router = PDRouter(vocab_size=257, max_queued_requests=64)
    nodes = NodeServer(router, TOKEN.encode(), node_id="master", epoch=1)
    context = make_context(router, server=server)  # type: ignore[arg-type]
    context.cluster = nodes
    context.requests.nodes_of = router.describe
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn_config(create_app(context), version="0", loop="asyncio", web_sockets=web_sockets(nodes))
    running = uvicorn.Server(config)
    running.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(running.serve(sockets=[listener]))
    router.start()
    found = Cluster(router, listener.getsockname()[1])
    try:
        yield found
    finally:
        for agent in found.agents:
            agent.leave("the test ends")
        for process in found.nodes.values():
            process.kill()
            process.wait()
        await found.client.aclose()
        router.close()
        nodes.close()
        running.should_exit = running.force_exit = True
        await task
        listener.close()


def run(test: Callable[[Cluster], Awaitable[None]], **server: Any) -> None:
    """Run a coroutine with a fresh pd_master."""

    async def main() -> None:
        async with cluster(**server) as found:
            await asyncio.wait_for(test(found), 60)

    asyncio.run(main())
