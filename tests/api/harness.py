"""The application over a fake engine, called through plain ASGI or through a real server on loopback."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import msgspec
import uvicorn

from lightllm.api.app import create_app
from lightllm.api.call import AppContext
from lightllm.api.metrics import Metrics
from lightllm.api.protocol import uvicorn_config
from lightllm.api.request_log import RequestLog
from lightllm.config import Config
from lightllm.frontend.generator import Generator
from tests.fakes import FakeEngineClient, byte_tokenizer

HEADERS = {"content-type": "application/json"}


def make_context(engine: FakeEngineClient, **sections: dict[str, Any]) -> AppContext:
    """A context over a fake engine; `sections` replace fields of the configuration, by section."""
    config = Config()
    for name, fields in sections.items():
        section = msgspec.structs.replace(getattr(config, name), **fields)
        config = msgspec.structs.replace(config, **{name: section})
    tokenizer = byte_tokenizer()
    metrics = Metrics("tiny", "0.0.0", engine)
    limit_s = config.server.request_timeout
    return AppContext(
        config=config,
        tokenizer=tokenizer,
        engine=engine,
        generator=Generator(tokenizer, engine, request_timeout_s=limit_s, observer=metrics),
        metrics=metrics,
        model_names=["tiny", "alias"],
        requests=RequestLog(config.observability.debug_ring),
        version="0.0.0",
    )


class Asgi:
    """One application, called without a socket."""

    def __init__(self, engine: FakeEngineClient, **sections: dict[str, Any]) -> None:
        self.engine = engine
        self.context = make_context(engine, **sections)
        transport = httpx.ASGITransport(app=create_app(self.context), client=("127.0.0.1", 1))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(path, content=content, headers={**HEADERS, **headers})


def run_asgi(
    test: Callable[[Asgi], Awaitable[None]], reply: str | list[int] = "hello", **sections: dict[str, Any]
) -> None:
    """Run one coroutine over a fresh application."""

    async def main() -> None:
        app = Asgi(FakeEngineClient(reply), **sections)
        async with app.client:
            await asyncio.wait_for(test(app), 20)

    asyncio.run(main())


@contextlib.asynccontextmanager
async def serving(context: AppContext) -> AsyncIterator[int]:
    """A real server on a free loopback port; yields the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn_config(create_app(context), version="0.0.0", loop="asyncio"))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110  uvicorn has no event for it
        await asyncio.sleep(0.005)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task
        listener.close()
