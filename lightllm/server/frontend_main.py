"""The frontend process: `python -m lightllm.server.frontend_main`, started by the supervisor.

Assembles tokenizer, engine client, generator and HTTP application, serves on the sockets that the supervisor
bound, and follows what the supervisor says of the engine. Never imports torch.
"""

import asyncio
import logging
import os
import signal
import socket
from typing import Any

import uvicorn
import uvloop

from lightllm import __version__
from lightllm.api.app import AppContext, create_app
from lightllm.api.cluster_metrics import ClusterMetrics
from lightllm.api.fields import sampling_defaults
from lightllm.api.metrics import Metrics
from lightllm.api.nodes import web_sockets
from lightllm.api.protocol import uvicorn_config
from lightllm.api.request_log import RequestLog
from lightllm.api.transfer_metrics import TransferMetrics
from lightllm.config import Config, decode_config
from lightllm.errors import LightLLMError
from lightllm.frontend.generator import Generator
from lightllm.logs import setup_logging
from lightllm.messages import (
    ChildConfig,
    ChildFailed,
    ChildReady,
    Drain,
    EngineDown,
    EngineStats,
    EngineUp,
    ToChild,
)
from lightllm.server.child import Parent, settle_memory
from lightllm.server.frontend_roles import port_of, role_of
from lightllm.server.model_files import describe_model, load_tokenizer

logger = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05
LAST_WRITE_S = 1.0


def main() -> int:
    """Serve until the parent goes or has us drain; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C on the terminal is the supervisor's business
    parent = Parent()
    child = parent.read_config()
    config = decode_config(child.config)
    setup_logging(config.observability.log_format, config.observability.log_level, "frontend")
    try:
        uvloop.run(Frontend(parent, child, config).serve())
    except LightLLMError as error:
        parent.send(ChildFailed(message=str(error), exit_code=error.exit_code))
        return error.exit_code
    except Exception as error:
        logger.exception("the frontend failed")
        parent.send(ChildFailed(message=f"{type(error).__name__}: {error}", exit_code=1))
        return 1
    return 0


class Frontend:
    """One HTTP process: the application and its reactions to the supervisor."""

    def __init__(self, parent: Parent, child: ChildConfig, config: Config) -> None:
        self.parent = parent
        self.child = child
        description = describe_model(config)
        tokenizer = load_tokenizer(config)
        self.role = role_of(config)(config, description, self._on_stats)
        engine = self.role.engine
        self.metrics = Metrics(config.model.served_model_name[0], __version__, engine)
        timeout_s = config.server.request_timeout
        self.generator = Generator(tokenizer, engine, request_timeout_s=timeout_s, observer=self.metrics)
        self.context = AppContext(
            config=config,
            tokenizer=tokenizer,
            engine=engine,
            generator=self.generator,
            metrics=self.metrics,
            model_names=list(config.model.served_model_name),
            requests=RequestLog(config.observability.debug_ring),
            version=__version__,
            sampling_defaults=sampling_defaults(description.generation_config),
        )
        app, links = create_app(self.context), web_sockets(self.role.cluster)
        self.server = uvicorn.Server(uvicorn_config(app, version=__version__, web_sockets=links))
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Answer requests until drained or orphaned."""
        loop = asyncio.get_running_loop()
        self.parent.watch(
            lambda message: _call(loop, self._on_message, message), lambda: _call(loop, self._stop)
        )
        sockets = [socket.socket(fileno=fd) for fd in self.child.listen_fds]
        self.role.start(port_of(sockets))
        self.context.cluster, self.context.agent = self.role.cluster, self.role.agent
        if self.role.cluster is not None:
            router = self.role.cluster.router
            self.context.requests.nodes_of = router.describe
            self.metrics.registry.register(ClusterMetrics(self.metrics.model, router))
        if self.role.agent is not None:
            transfers = TransferMetrics(self.metrics.model)
            self.metrics.registry.register(transfers)
            self.role.agent.engine.on_kv_transfers = transfers.note
            self.role.agent.kv_totals = transfers.totals
        settle_memory()
        self.parent.send(ChildReady())
        await self.server.serve(sockets)
        await self.role.close()

    def _on_stats(self, stats: EngineStats) -> None:
        self.metrics.step(stats)

    def _on_message(self, message: ToChild) -> None:
        match message:
            case EngineUp():
                self.role.engine_up(message)
            case EngineDown():
                self.role.engine_down(message)
            case Drain(timeout_s=timeout_s):
                task = asyncio.get_running_loop().create_task(self._drain(timeout_s))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    async def _drain(self, timeout_s: float) -> None:
        """Let what runs finish, end the rest in an error, then stop."""
        self.context.is_draining = True
        self.role.begin_drain()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while (self.generator.num_live or self.role.num_live) and loop.time() < deadline:  # noqa: ASYNC110 - once in a process's life
            await asyncio.sleep(DRAIN_POLL_S)
        if self.generator.num_live:
            logger.warning("%d requests did not finish in %g s", self.generator.num_live, timeout_s)
            self.generator.fail_all(
                "draining", "the server is stopping and the request did not finish in time"
            )
            await asyncio.sleep(DRAIN_POLL_S)
        self._stop()

    def _stop(self) -> None:
        self.server.should_exit = True
        # uvicorn waits for open connections; a client that keeps one must not keep the process.
        asyncio.get_running_loop().call_later(LAST_WRITE_S, os._exit, 0)


def _call(loop: asyncio.AbstractEventLoop, function: Any, *arguments: Any) -> None:
    """Run a function in the loop, from another thread; a loop that has ended needs nothing any more."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
