"""The supervisor: starts the processes of a node, keeps them alive and stops them.

Runs in the process that the user started; holds the listening sockets, so that a restarted frontend keeps its
port. Serves no request and imports neither torch nor the HTTP stack. A child's first error becomes the
parent's last line. Restarts use back-off and end after `MAX_RESTARTS` within `RESTART_WINDOW_S`.
"""

import asyncio
import logging
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lightllm import messages
from lightllm.config import Config, encode_config
from lightllm.errors import LightLLMError
from lightllm.messages import (
    ChildConfig,
    ChildFailed,
    ChildProgress,
    ChildReady,
    Drain,
    EngineDown,
    EngineInfo,
    EngineUp,
    FromChild,
    ToChild,
)
from lightllm.server.child import LENGTH, frame

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
RESTART_WINDOW_S = 60.0
BACK_OFF_S = 0.25
EXIT_GRACE_S = 5.0


@dataclass(frozen=True)
class Processes:
    """The children of a role: the module of its frontend, and whether it has an engine."""

    frontend: str = "lightllm.server.frontend_main"
    has_engine: bool = True


@dataclass
class Child:
    """A process of the node. `epoch` counts its lives."""

    name: str
    module: str
    epoch: int = 0
    process: asyncio.subprocess.Process | None = None
    is_ready: bool = False
    failure: ChildFailed | None = None
    restarts: deque[float] = field(default_factory=deque)

    def send(self, message: ToChild) -> None:
        """Write one frame to the child's stdin; nothing happens if it is not running."""
        if self.process is not None and self.process.stdin is not None and self.process.returncode is None:
            self.process.stdin.write(frame(message))

    def stop(self) -> None:
        """Close the child's stdin, which asks it to leave."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()

    def obituary(self) -> str:
        """Why the last life ended, as a sentence."""
        if self.failure is not None:
            return self.failure.message
        code = self.process.returncode if self.process is not None else None
        if code is not None and code < 0:
            return f"the {self.name} process was killed by {signal.Signals(-code).name}"
        return f"the {self.name} process exited with code {code}"


class Supervisor:
    """Runs one node until it is told to stop or cannot go on; `start_up_error` says why it never served.

    Args:
        config: the resolved configuration.
        sockets: listening sockets, handed to the frontend.
        directory: private directory (mode 0700) for the ipc addresses.
        environment: of the children.
        on_progress: told how far loading is.
        on_ready: called once, when the node first answers requests; with what its engine is, if it has one.
        processes: which children the role has.
    """

    def __init__(
        self,
        config: Config,
        sockets: list[socket.socket],
        directory: Path,
        environment: dict[str, str],
        on_progress: Callable[[ChildProgress], None],
        on_ready: Callable[[EngineInfo | None], None],
        processes: Processes = Processes(),
    ) -> None:
        self.config = config
        self.sockets = sockets
        self.directory = directory
        self.environment = environment
        self.on_progress = on_progress
        self.on_ready = on_ready
        self.engine = Child("engine", "lightllm.server.engine_main")
        self.frontend = Child("frontend", processes.frontend)
        self.children = (self.frontend, self.engine) if processes.has_engine else (self.frontend,)
        self.engine_up: EngineUp | None = None
        self.was_ready = False
        self.start_up_error: LightLLMError | None = None
        self._stopping = asyncio.Event()
        self._exit_code: asyncio.Future[int] | None = None

    async def run(self) -> int:
        """Start everything, serve, stop everything; returns the exit code of the process."""
        loop = asyncio.get_running_loop()
        self._exit_code = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        keepers = [asyncio.create_task(self._keep(child)) for child in self.children]
        code = await self._exit_code
        self._stopping.set()
        for child in self.children:
            child.stop()
        _, late = await asyncio.wait(keepers, timeout=EXIT_GRACE_S)
        for child in self.children:
            child.kill()
        if late:
            await asyncio.wait(late)
        for keeper in keepers:
            if keeper.exception() is not None:
                logger.error("the supervisor failed", exc_info=keeper.exception())
                code = code or 1
        return code

    async def _keep(self, child: Child) -> None:
        """Run a child, again and again as far as the restart policy allows."""
        try:
            while not self._stopping.is_set():
                await self._live(child)
                if self._stopping.is_set():
                    if child is self.engine:
                        self._engine_died(will_restart=False)  # requests that drain wait for nothing more
                    return
                will_restart = self._may_restart(child)
                if child is self.engine:
                    self._engine_died(will_restart)
                if not self.was_ready:
                    # Printed last, when all children have had their say.
                    self.start_up_error = self.start_up_error or LightLLMError(child.obituary())
                else:
                    logger.error("%s", child.obituary())
                if not will_restart:
                    self._finish(child.failure.exit_code if child.failure is not None else 1)
                    return
                await asyncio.sleep(BACK_OFF_S * 2 ** (len(child.restarts) - 1))
        except Exception:
            self._finish(1)
            raise

    async def _live(self, child: Child) -> None:
        """One life of a child: from spawn to exit."""
        child.epoch += 1
        child.is_ready, child.failure = False, None
        child.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            child.module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[s.fileno() for s in self.sockets] if child is self.frontend else (),
            env=self.environment,
            start_new_session=True,
        )
        child.send(self._child_config(child))
        if child is self.frontend and self.engine_up is not None:
            child.send(self.engine_up)
        assert child.process.stdout is not None
        await self._read_frames(child, child.process.stdout)
        await child.process.wait()

    async def _read_frames(self, child: Child, stream: asyncio.StreamReader) -> None:
        decoder = messages.decoder(FromChild)
        try:
            while True:
                (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
                self._on_frame(child, decoder.decode(await stream.readexactly(length)))
        except (asyncio.IncompleteReadError, struct.error):
            return

    def _on_frame(self, child: Child, message: FromChild) -> None:
        match message:
            case ChildProgress():
                self.on_progress(message)
            case ChildFailed():
                child.failure = message
            case ChildReady(info=info):
                child.is_ready = True
                if info is not None:
                    self.engine_up = EngineUp(
                        epoch=child.epoch,
                        address=self._engine_address(),
                        reply_address=self._reply_address(),
                        info=info,
                    )
                    self.frontend.send(self.engine_up)
                if all(child.is_ready for child in self.children) and not self.was_ready:
                    self.was_ready = True
                    self.on_ready(self.engine_up.info if self.engine_up is not None else None)

    def _engine_died(self, will_restart: bool) -> None:
        self.engine_up = None
        reason = self.engine.obituary()
        self.frontend.send(EngineDown(epoch=self.engine.epoch, reason=reason, is_restarting=will_restart))

    def _may_restart(self, child: Child) -> bool:
        """Whether another life is allowed; counts it if so. A node that never served is not restarted."""
        if not self.was_ready or self.config.engine.restart_policy == "never":
            return False
        now = time.monotonic()
        while child.restarts and now - child.restarts[0] > RESTART_WINDOW_S:
            child.restarts.popleft()
        if len(child.restarts) >= MAX_RESTARTS:
            logger.error(
                "the %s died %d times in %d s: giving up", child.name, MAX_RESTARTS + 1, RESTART_WINDOW_S
            )
            return False
        child.restarts.append(now)
        return True

    def _on_signal(self) -> None:
        if self._stopping.is_set() or not self.was_ready:
            for child in self.children:
                child.kill()
            self._finish(1 if self._stopping.is_set() else 0)
            self._stopping.set()
            return
        self._stopping.set()
        timeout_s = self.config.server.drain_timeout
        logger.info("draining: running requests may finish within %g s; a second signal stops now", timeout_s)
        self.frontend.send(Drain(timeout_s=timeout_s))
        asyncio.get_running_loop().create_task(self._finish_after_drain(timeout_s))

    async def _finish_after_drain(self, timeout_s: float) -> None:
        if self.frontend.process is not None:
            try:
                await asyncio.wait_for(self.frontend.process.wait(), timeout_s + EXIT_GRACE_S)
            except TimeoutError:
                logger.error("the frontend did not finish draining in %g s", timeout_s + EXIT_GRACE_S)
        self._finish(0)

    def _finish(self, code: int) -> None:
        if self._exit_code is not None and not self._exit_code.done():
            self._exit_code.set_result(code)

    def _child_config(self, child: Child) -> ChildConfig:
        return ChildConfig(
            config=encode_config(self.config),
            address=self._engine_address() if child is self.engine else "",
            reply_address=self._reply_address(),
            listen_fds=[s.fileno() for s in self.sockets] if child is self.frontend else [],
            epoch=child.epoch,
        )

    def _engine_address(self) -> str:
        # A new address for each life: what was sent to a dead engine must not reach the next one.
        return f"ipc://{self.directory}/engine-{self.engine.epoch}"

    def _reply_address(self) -> str:
        return f"ipc://{self.directory}/frontend"
