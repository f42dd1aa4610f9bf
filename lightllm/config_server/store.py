"""Where a config_server keeps its list of pd_masters, by `--config_server_store`.

A store is told of the masters that are linked to this config_server, and says what the whole list is.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from lightllm.addresses import split_addresses
from lightllm.cluster_messages import MasterEntry
from lightllm.errors import ConfigError

MEMORY, ETCD = "memory", "etcd://"


class Store(Protocol):
    """Where the list is kept.

    Attributes:
        fault: why the store cannot be used at the moment, empty while it can.
        on_change: called with the list when it has become another one.
    """

    fault: str
    on_change: Callable[[list[MasterEntry]], None]

    async def check(self) -> None:
        """See whether the store is there; raises ClusterError if not."""
        ...

    async def run(self) -> None:
        """Keep in step with what others write, until cancelled."""
        ...

    def put(self, entry: MasterEntry) -> None:
        """List a master until `remove`; a new life of it replaces the old one."""
        ...

    def remove(self, entry: MasterEntry) -> None:
        """List this life of a master no more."""
        ...

    def stop(self) -> None:
        """The config_server ends, its masters do not: from now on nothing is removed."""
        ...


def make_store(text: str, token: bytes) -> Store:
    """The store that `--config_server_store` names.

    Raises:
        ConfigError: it needs a package that is not installed.
    """
    if text == MEMORY:
        return MemoryStore()
    try:
        from lightllm.config_server.etcd import EtcdClient
        from lightllm.config_server.etcd_store import EtcdStore
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--config_server_store {text}: etcd is spoken to through the package {error.name}, which is not "
            "installed: pip install 'lightllm[etcd]', or leave the flag out (default memory)"
        ) from error
    return EtcdStore(EtcdClient(split_addresses(text.removeprefix(ETCD))), token)


class MemoryStore:
    """The list of one config_server alone."""

    def __init__(self) -> None:
        self.fault = ""
        self.on_change: Callable[[list[MasterEntry]], None] = lambda entries: None
        self._entries: dict[str, MasterEntry] = {}

    async def check(self) -> None:
        """It is there."""

    async def run(self) -> None:
        """Nobody else writes."""
        await asyncio.Event().wait()

    def put(self, entry: MasterEntry) -> None:
        """List a master."""
        self._entries[entry.node_id] = entry
        self.on_change(list(self._entries.values()))

    def remove(self, entry: MasterEntry) -> None:
        """List it no more."""
        if self._entries.get(entry.node_id) == entry:
            del self._entries[entry.node_id]
            self.on_change(list(self._entries.values()))

    def stop(self) -> None:
        """Nothing outlives the process."""
