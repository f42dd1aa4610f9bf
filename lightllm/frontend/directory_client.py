"""What nodes and pd_masters have to do with a config_server: to be listed there, and to follow the list.

Runs in frontends. A config_server that is away costs nothing: the last list stays in force, and a master
registers anew when it is back.
"""

import logging
from collections.abc import Callable

from lightllm import messages
from lightllm.cluster_link import Dialer, Welcome
from lightllm.cluster_messages import (
    MASTER_PATH,
    MASTER_PURPOSE,
    WATCH_PATH,
    WATCH_PURPOSE,
    Beat,
    MasterEntry,
    MasterList,
    ToWatcher,
)
from lightllm.node_link import Dialling, Link

logger = logging.getLogger(__name__)


class MasterEntryLink:
    """Keeps a pd_master listed.

    Args:
        advertised: (host, port) at which nodes reach it.
    """

    def __init__(
        self, host: str, port: int, token: bytes, node_id: str, epoch: int, *, advertised: tuple[str, int]
    ) -> None:
        entry = MasterEntry(node_id=node_id, epoch=epoch, host=advertised[0], port=advertised[1])
        detail = messages.encode(entry)
        self._dialling = Dialling(
            host,
            port,
            MASTER_PATH,
            self,
            lambda: Dialer(token, MASTER_PURPOSE, node_id, epoch, detail),
            "config_server",
        )

    def stop(self) -> None:
        """Be listed no more."""
        self._dialling.stop("the pd_master is stopping")

    def on_open(self, link: Link, welcome: Welcome | None) -> None:
        """Listed."""

    def on_body(self, link: Link, body: bytes) -> None:
        """Nothing but signs of life."""
        messages.decode(body, Beat)

    def on_closed(self, link: Link, reason: str) -> None:
        """The config_server is away; traffic does not need it."""

    def heartbeat(self, link: Link) -> Beat:
        """Alive."""
        return Beat()


class MasterWatch:
    """Follows the list of pd_masters.

    Args:
        on_change: called with every (host, port) of the list, at once and at each change.
    """

    def __init__(
        self,
        host: str,
        port: int,
        token: bytes,
        node_id: str,
        epoch: int,
        on_change: Callable[[set[tuple[str, int]]], None],
    ) -> None:
        self._on_change = on_change
        self._dialling = Dialling(
            host,
            port,
            WATCH_PATH,
            self,
            lambda: Dialer(token, WATCH_PURPOSE, node_id, epoch),
            "config_server",
        )

    def stop(self) -> None:
        """Follow no more."""
        self._dialling.stop("the node is stopping")

    def on_open(self, link: Link, welcome: Welcome | None) -> None:
        """The list follows."""

    def on_body(self, link: Link, body: bytes) -> None:
        """The list has changed."""
        message: ToWatcher = messages.decode(body, ToWatcher)
        if isinstance(message, MasterList):
            self._on_change({(entry.host, entry.port) for entry in message.pd_masters})

    def on_closed(self, link: Link, reason: str) -> None:
        """The last list stays in force."""

    def heartbeat(self, link: Link) -> Beat:
        """Alive."""
        return Beat()
