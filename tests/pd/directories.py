"""config_servers in the test's own event loop, and what pd_masters and nodes have to do with them."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from functools import partial

import uvicorn

from lightllm.api.keys import is_known_key
from lightllm.api.protocol import uvicorn_config
from lightllm.config_server.app import ConfigServerApp, MasterDirectory
from lightllm.config_server.store import MemoryStore, Store
from lightllm.frontend.directory_client import MasterEntryLink, MasterWatch
from lightllm.server.config_server_main import _fail
from tests.pd.harness import TOKEN, until

Lists = list[set[tuple[str, int]]]


@contextlib.asynccontextmanager
async def directory(port: int = 0, key: str = "", store: Store | None = None) -> AsyncIterator[int]:
    """A config_server; yields its port. At the end it is gone as if killed."""
    store = store or MemoryStore()
    masters = MasterDirectory(TOKEN.encode(), 1, store)
    await store.check()
    secrets = [text.encode() for text in (TOKEN, key) if text]
    app = ConfigServerApp(masters, partial(is_known_key, keys=secrets), has_key=bool(key), fail=_fail)
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn_config(app, version="0", loop="asyncio", web_sockets=app.web_sockets())
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    serving, running = asyncio.create_task(server.serve(sockets=[listener])), asyncio.create_task(store.run())
    await until(lambda: server.started)
    try:
        yield listener.getsockname()[1]
    finally:
        store.stop()
        running.cancel()
        for link in [*masters._watchers, *(end._link for end in masters._ends.values())]:
            if link is not None:
                link.abort("stopped")
        server.should_exit = server.force_exit = True
        await serving
        await asyncio.wait({running})
        listener.close()


def entry(port: int, name: str, at: int, token: str = TOKEN, epoch: int = 1) -> MasterEntryLink:
    """A pd_master that has itself listed."""
    return MasterEntryLink("127.0.0.1", port, token.encode(), name, epoch, advertised=("10.0.0.1", at))


def watch(port: int) -> tuple[MasterWatch, Lists]:
    """A node that follows the list, and every list that it was sent."""
    lists: Lists = []
    return MasterWatch("127.0.0.1", port, TOKEN.encode(), "node", 1, lists.append), lists
