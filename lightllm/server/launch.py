"""From a resolved configuration to running processes: bind, start, show progress, print the ready line.

Runs in the process that the user started. Knows which role needs which processes; the supervisor keeps them
alive.
"""

import asyncio
import logging
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TextIO

from lightllm.cli import format_error
from lightllm.cluster_link import cluster_token
from lightllm.config import FLAGS, Config
from lightllm.errors import BindError
from lightllm.messages import ChildProgress, EngineInfo
from lightllm.server.advertise import bind_address, with_advertised_host
from lightllm.server.supervisor import Processes, Supervisor

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

logger = logging.getLogger(__name__)

LISTEN_BACKLOG = 2048
# Roles that differ from the ordinary frontend and engine.
PROCESSES = MappingProxyType(
    {
        "pd_master": Processes(has_engine=False),
        "config_server": Processes("lightllm.server.config_server_main", has_engine=False),
    }
)


def launch(config: Config) -> int:
    """Serve until stopped; returns the exit code.

    Raises:
        BindError: the HTTP address is taken or not of this machine.
    """
    raise_file_limit()
    if config.parallel.node_rank > 0:
        return run_workers_only(config)
    processes = PROCESSES.get(config.server.run_mode, Processes())
    config = with_advertised_host(config)
    if config.server.run_mode != "normal":
        # Made, or refused, before all else.
        cluster_token(config.security.cluster_token, config.environment.home)
    listener = bind(*bind_address(config))
    directory = Path(tempfile.mkdtemp(prefix="lightllm-"))  # made with mode 0700
    display = ProgressDisplay()

    def on_ready(info: EngineInfo | None) -> None:
        display.close()
        announce(config, listener, info)

    environment = child_environment(config)
    supervisor = Supervisor(config, [listener], directory, environment, display.show, on_ready, processes)
    try:
        code = asyncio.run(supervisor.run())
    finally:
        display.close()
        listener.close()
        shutil.rmtree(directory, ignore_errors=True)
    if supervisor.start_up_error:
        print(format_error(supervisor.start_up_error), file=sys.stderr)
    return code


def run_workers_only(config: Config) -> int:
    """Serve machine 0 of a node until stopped; returns the exit code."""
    from lightllm.server.other_machine import follow

    environment = child_environment(config)
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    return follow(config)


def raise_file_limit() -> None:
    """Use all open files that this user may have: each client is one, and the usual 1024 are soon gone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            logger.warning("the limit of open files stays at %d: %s", soft, error)


def bind(host: str, port: int) -> socket.socket:
    """Bind and listen before anything is loaded, so that a taken port costs no one a minute."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        raise BindError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; "
            "choose another address with --host and --port (0 takes a free port)"
        ) from error
    return listener


def announce(config: Config, listener: socket.socket, info: EngineInfo | None) -> None:
    """Print the one ready line on stdout, and a command to try on stderr where there is something to try."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    mode = config.server.run_mode
    model = "" if mode == "config_server" else f" model={config.model.served_model_name[0]}"
    engine = ""
    if info is not None:
        engine = f" device={info.device} kv_tokens={info.kv_total_tokens} load={info.load_s:.1f}"
    _tell(f"ready: {url}{model} mode={mode}{engine}", sys.stdout)
    if config.observability.log_format == "json" or mode not in ("normal", "pd_master"):
        return  # one event a line, nothing else; or nothing that a client could ask
    reachable = url if host not in ("0.0.0.0", "::") else f"http://127.0.0.1:{port}"
    _tell(
        f"try:\n  curl {reachable}/generate -H 'Content-Type: application/json' \\\n"
        """    -d '{"inputs":"What is AI?","parameters":{"max_new_tokens":17,"frequency_penalty":1}}'\n"""
        f"or open {reachable}/ in a browser",
        sys.stderr,
    )


def _tell(text: str, stream: TextIO) -> None:
    """Print; a disk that is full, or a reader that has left, is no reason not to serve."""
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        logger.warning("cannot be printed (%s): %s", error, text)


# NVLink multicast takes resources of the switches that GPUs of other processes share; so do its faults.
NO_MULTICAST: Mapping[str, str] = MappingProxyType(
    {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
)


def child_environment(config: Config) -> dict[str, str]:
    """The parent's environment, plus what libraries read before they are imported, less our secrets.

    Children get their configuration through a pipe, where secrets belong.
    """
    secrets = {f"LIGHTLLM_{name.upper()}" for name, spec in FLAGS.items() if spec.flag.is_secret}
    environment = {name: value for name, value in os.environ.items() if name not in secrets}
    environment["OMP_NUM_THREADS"] = str(config.environment.omp_num_threads)
    return {**NO_MULTICAST, **environment}


class ProgressDisplay:
    """Loading progress: a bar on a terminal, one log line per stage elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._logged: set[str] = set()

    def show(self, progress: ChildProgress) -> None:
        """Take one report of a child."""
        if not sys.stderr.isatty():
            if progress.stage not in self._logged:
                self._logged.add(progress.stage)
                logger.info("%s", progress.stage)
            return
        if self._bar is None:
            self._bar = _new_bar()
            self._bar.start()
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bar.add_task(progress.stage, total=progress.total or None)
        self._bar.update(self._tasks[progress.stage], completed=progress.done, total=progress.total or None)

    def close(self) -> None:
        """Leave the finished bars on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _new_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
