"""The config_server process: `python -m lightllm.server.config_server_main`, started by the supervisor.

Serves `config_server.app` over the frontend's HTTP protocol class, and keeps its store. Loads no model and no
tokenizer.
"""

import asyncio
import logging
import os
import signal
import socket
from functools import partial
from typing import Any

import uvicorn
import uvloop

from lightllm import __version__
from lightllm.api.errors import envelope, error_headers
from lightllm.api.keys import is_known_key
from lightllm.api.protocol import uvicorn_config
from lightllm.cluster_link import cluster_token, new_epoch
from lightllm.config import Config, decode_config
from lightllm.config_server.app import ConfigServerApp, MasterDirectory, Send
from lightllm.config_server.store import Store, make_store
from lightllm.errors import ClusterError, ConfigError, LightLLMError
from lightllm.logs import setup_logging
from lightllm.messages import ChildConfig, ChildFailed, ChildReady, Drain, ToChild
from lightllm.server.child import Parent

logger = logging.getLogger(__name__)

LAST_WRITE_S = 1.0


def main() -> int:
    """Serve until the parent goes or has us drain; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C on the terminal is the supervisor's business
    parent = Parent()
    child = parent.read_config()
    config = decode_config(child.config)
    setup_logging(config.observability.log_format, config.observability.log_level, "config_server")
    try:
        uvloop.run(_serve(parent, child, config))
    except LightLLMError as error:
        parent.send(ChildFailed(message=str(error), exit_code=error.exit_code))
        return error.exit_code
    return 0


async def _serve(parent: Parent, child: ChildConfig, config: Config) -> None:
    token = cluster_token(config.security.cluster_token, config.environment.home)
    keys = [key.encode() for key in config.security.api_key]
    store = make_store(config.config_server.config_server_store, token)
    directory = MasterDirectory(token, new_epoch(), store)
    if child.epoch == 1:
        await _check(store, config)  # later lives wait for a store that is away
    is_known = partial(is_known_key, keys=[*keys, token])
    app = ConfigServerApp(directory, is_known, has_key=bool(keys), fail=_fail)
    server = uvicorn.Server(uvicorn_config(app, version=__version__, web_sockets=app.web_sockets()))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        store.stop()
        server.should_exit = True
        loop.call_later(LAST_WRITE_S, os._exit, 0)

    def on_message(message: ToChild) -> None:
        if isinstance(message, Drain):
            loop.call_soon_threadsafe(stop)

    parent.watch(on_message, lambda: _orphaned(loop, stop))
    parent.send(ChildReady())
    sockets = [socket.socket(fileno=fd) for fd in child.listen_fds]
    tasks = {loop.create_task(store.run()), loop.create_task(server.serve(sockets))}
    ended, running = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in running:
        task.cancel()
    for task in ended:
        task.result()


async def _check(store: Store, config: Config) -> None:
    """Refuse to start with a store that is not there: most likely its address is wrong."""
    try:
        await store.check()
    except ClusterError as error:
        text = config.config_server.config_server_store
        raise ConfigError(
            f"--config_server_store {text}: no etcd answers there ({error}); start it, or correct the address"
        ) from error


def _orphaned(loop: asyncio.AbstractEventLoop, stop: Any) -> None:
    try:
        loop.call_soon_threadsafe(stop)
    except RuntimeError:  # the loop has ended
        os._exit(0)


async def _fail(send: Send, code: str, message: str) -> None:
    error = LightLLMError(message, code=code)
    body = envelope(error)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += error_headers(error)
    await send({"type": "http.response.start", "status": error.kind.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    raise SystemExit(main())
