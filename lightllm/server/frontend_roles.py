"""What a frontend process has behind its HTTP routes, by role: an engine, one with masters, or a cluster.

Assembled in the frontend process. The routes themselves, and everything between them and `engine`, are the
same in all roles.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

from lightllm import __version__
from lightllm.cluster_link import cluster_token, new_epoch
from lightllm.config import Config
from lightllm.frontend.directory_client import MasterEntryLink, MasterWatch
from lightllm.frontend.engine_client import EngineClient, EngineClientLike
from lightllm.frontend.node_agent import NodeAgent
from lightllm.frontend.node_server import NodeServer
from lightllm.frontend.pd_router import PDRouter
from lightllm.messages import EngineDown, EngineStats, EngineUp
from lightllm.server.fingerprint import tokenizer_fingerprint
from lightllm.server.model_files import ModelDescription, tokenizer_files

logger = logging.getLogger(__name__)

OnStats = Callable[[EngineStats], None]
LAST_WORD_S = 0.1


class LocalRole:
    """normal: one engine of our own."""

    def __init__(self, config: Config, description: ModelDescription, on_stats: OnStats) -> None:
        whole_tokens = config.engine.max_req_total_len if config.engine.disable_chunked_prefill else 0
        max_step_tokens = max(config.engine.batch_max_tokens, whole_tokens)
        self.local = EngineClient(on_stats=on_stats, max_step_tokens=max_step_tokens)
        self.engine: EngineClientLike = self.local
        self.agent: NodeAgent | None = None
        self.cluster: NodeServer | None = None

    @property
    def num_live(self) -> int:
        """Requests that a drain waits for, beside those of our own HTTP clients."""
        return 0

    def start(self, port: int) -> None:
        """The event loop runs, and HTTP is served at this port."""

    def engine_up(self, up: EngineUp) -> None:
        """An engine is ready."""
        self.local.connect(up)

    def engine_down(self, down: EngineDown) -> None:
        """The engine has died."""
        self.local.disconnect(down)

    def begin_drain(self) -> None:
        """Nothing new is taken any more."""

    async def close(self) -> None:
        """The process ends."""
        self.local.close()


class NodeRole(LocalRole):
    """prefill, decode: an engine of our own that works for pd_masters."""

    def __init__(self, config: Config, description: ModelDescription, on_stats: OnStats) -> None:
        super().__init__(config, description, on_stats)
        self._config = config
        self._token = cluster_token(config.security.cluster_token, config.environment.home)
        self._epoch = new_epoch()
        self._watch: MasterWatch | None = None

    @property
    def num_live(self) -> int:
        return self.agent.num_live if self.agent is not None else 0

    def start(self, port: int) -> None:
        server = self._config.server
        address = f"{server.advertise_host}:{port}"
        self.agent = NodeAgent(
            self.local,
            self._token,
            node_id=f"{server.run_mode}-{address}",
            epoch=self._epoch,
            role=server.run_mode,
            address=address,
            version=__version__,
        )

    def engine_up(self, up: EngineUp) -> None:
        super().engine_up(up)
        assert self.agent is not None, "start comes first"
        self.agent.engine_changed("is a new one")
        # Not before: what is announced is what the engine says of itself.
        pd, directory = self._config.pd, self._config.config_server
        if pd.pd_master_ip is not None:
            self.agent.follow({(pd.pd_master_ip, pd.pd_master_port)})
        elif self._watch is None:
            assert directory.config_server_host is not None
            assert directory.config_server_port is not None
            address = directory.config_server_host, directory.config_server_port
            name, epoch = self.agent.node_id, self._epoch
            self._watch = MasterWatch(*address, self._token, name, epoch, self.agent.follow)

    def engine_down(self, down: EngineDown) -> None:
        super().engine_down(down)
        assert self.agent is not None, "start comes first"
        self.agent.engine_changed(f"is down: {down.reason}")

    def begin_drain(self) -> None:
        if self.agent is not None:
            self.agent.drain()

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        if self.agent is not None:
            self.agent.leave("the node is stopping")
            await asyncio.sleep(LAST_WORD_S)
        await super().close()


class MasterRole:
    """pd_master: no engine of our own, but those of the nodes."""

    def __init__(self, config: Config, description: ModelDescription, on_stats: OnStats) -> None:
        self._config = config
        self._token = cluster_token(config.security.cluster_token, config.environment.home)
        self._epoch = new_epoch()
        self._entry: MasterEntryLink | None = None
        self.router = PDRouter(
            vocab_size=description.config.vocab_size, max_queued_requests=config.server.max_queued_requests
        )
        self.engine: EngineClientLike = self.router
        self.agent: NodeAgent | None = None
        self.cluster = NodeServer(
            self.router,
            self._token,
            node_id="pd_master",
            epoch=self._epoch,
            tokenizer_hash=tokenizer_fingerprint(tokenizer_files(config)),
        )

    @property
    def num_live(self) -> int:
        """Requests that a drain waits for, beside those of our own HTTP clients."""
        return 0

    def start(self, port: int) -> None:
        """Route, and tell the config_server where we are."""
        self.router.start()
        directory, host = self._config.config_server, self._config.server.advertise_host
        self.cluster.node_id = f"pd_master-{host}:{port}"
        if directory.config_server_host is not None:
            assert directory.config_server_port is not None
            assert host is not None
            address = directory.config_server_host, directory.config_server_port
            name, epoch = self.cluster.node_id, self._epoch
            self._entry = MasterEntryLink(*address, self._token, name, epoch, advertised=(host, port))

    def engine_up(self, up: EngineUp) -> None:
        """There is none."""

    def engine_down(self, down: EngineDown) -> None:
        """There is none."""

    def begin_drain(self) -> None:
        """Nodes and clients are told to look elsewhere."""
        if self._entry is not None:
            self._entry.stop()

    async def close(self) -> None:
        """The process ends."""
        self.begin_drain()
        self.router.close()
        self.cluster.close()
        await asyncio.sleep(LAST_WORD_S)


Role = LocalRole | MasterRole


def role_of(config: Config) -> Callable[[Config, ModelDescription, OnStats], Role]:
    """The class for a run mode."""
    roles: dict[str, Callable[[Config, ModelDescription, OnStats], Role]] = {
        "normal": LocalRole,
        "prefill": NodeRole,
        "decode": NodeRole,
        "pd_master": MasterRole,
    }
    return roles[config.server.run_mode]


def port_of(sockets: list[socket.socket]) -> int:
    """Where HTTP is served."""
    port: int = sockets[0].getsockname()[1]
    return port
