"""The config_server: pd_masters keep themselves listed here, nodes follow the list.

The list lies in a `store`, and comes back by itself after a restart, because masters register anew. Traffic
never needs it. Serves two WebSockets, the list as JSON for people, and the health routes. Runs in a process
of its own; knows no model, no request and no node.
"""

import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from lightllm import messages
from lightllm.addresses import is_loopback
from lightllm.cluster_link import Acceptor, Hello, Seal, Welcome
from lightllm.cluster_messages import (
    MASTER_PATH,
    MASTER_PURPOSE,
    WATCH_PATH,
    WATCH_PURPOSE,
    Beat,
    MasterEntry,
    MasterList,
)
from lightllm.config_server.store import Store
from lightllm.node_link import Link, accept
from lightllm.web_socket import WebSocket

logger = logging.getLogger(__name__)

NODE_ID = "config_server"
HEALTH = MappingProxyType(
    {"/health": "message", "/healthz": "message", "/liveness": "status", "/readiness": "status"}
)

Send = Callable[[dict[str, Any]], Awaitable[None]]


class MasterDirectory:
    """The list of pd_masters and all who follow it. A master is listed as long as its link lives."""

    def __init__(self, token: bytes, epoch: int, store: Store) -> None:
        self.version = 0
        self.store = store
        self._token = token
        self._epoch = epoch
        self._entries: list[MasterEntry] = []
        self._ends: dict[str, _MasterEnd] = {}
        self._watchers: set[Link] = set()
        store.on_change = self._changed

    @property
    def num_watchers(self) -> int:
        """Nodes that follow the list."""
        return len(self._watchers)

    def listing(self) -> MasterList:
        """The list as it is now."""
        return MasterList(version=self.version, pd_masters=self._entries)

    def accept_master(self, socket: WebSocket) -> None:
        """A WebSocket opened at MASTER_PATH."""
        self._accept(socket, MASTER_PURPOSE, _MasterEnd(self))

    def accept_watcher(self, socket: WebSocket) -> None:
        """A WebSocket opened at WATCH_PATH."""
        self._accept(socket, WATCH_PURPOSE, _WatcherEnd(self))

    def list_master(self, end: "_MasterEnd", entry: MasterEntry) -> None:
        """A master is there; a new life of it replaces the old one."""
        earlier = self._ends.get(entry.node_id)
        self._ends[entry.node_id] = end
        if earlier is not None:
            earlier.close("this pd_master has registered anew")
        logger.info("%s is listed at %s:%d", entry.node_id, entry.host, entry.port)
        self.store.put(entry)

    def unlist_master(self, end: "_MasterEnd", entry: MasterEntry, reason: str) -> None:
        """A master's link is gone; nothing happens if another one has taken its place."""
        if self._ends.get(entry.node_id) is end:
            del self._ends[entry.node_id]
            logger.info("%s is not listed any more: %s", entry.node_id, reason)
            self.store.remove(entry)

    def watch(self, link: Link) -> None:
        """Send the list now and whenever it changes."""
        self._watchers.add(link)
        link.send(self.listing())

    def unwatch(self, link: Link) -> None:
        """The link is gone."""
        self._watchers.discard(link)

    def _changed(self, entries: list[MasterEntry]) -> None:
        self.version += 1
        self._entries = entries
        listing = self.listing()
        for link in list(self._watchers):
            link.send(listing)

    def _accept(self, socket: WebSocket, purpose: str, owner: "_MasterEnd | _WatcherEnd") -> None:
        acceptor = Acceptor(self._token, purpose)

        def greet(hello: Hello, link: Link) -> tuple[bytes, Seal]:
            try:
                owner.take(hello)
            except msgspec.DecodeError as error:
                text = f"the registration is not this version's: {error}"
                raise acceptor.refuse("bad_protocol", text) from error
            return acceptor.welcome(NODE_ID, self._epoch)

        accept(socket, acceptor, owner, greet)


class _MasterEnd:
    """The link of one pd_master."""

    def __init__(self, directory: MasterDirectory) -> None:
        self._directory = directory
        self._link: Link | None = None
        self._entry: MasterEntry | None = None

    def take(self, hello: Hello) -> None:
        """What it registers."""
        entry = messages.decode(hello.detail, MasterEntry)
        self._entry = msgspec.structs.replace(
            entry, node_id=hello.node_id, epoch=hello.epoch, since=round(time.time(), 3)
        )

    def close(self, reason: str) -> None:
        """Its successor is there."""
        if self._link is not None:
            self._link.close(reason)

    def on_open(self, link: Link, welcome: Welcome | None) -> None:
        """Registered."""
        assert self._entry is not None
        self._link = link
        self._directory.list_master(self, self._entry)

    def on_body(self, link: Link, body: bytes) -> None:
        """Nothing but signs of life."""
        messages.decode(body, Beat)

    def on_closed(self, link: Link, reason: str) -> None:
        """Gone."""
        assert self._entry is not None
        self._directory.unlist_master(self, self._entry, reason)

    def heartbeat(self, link: Link) -> Beat:
        """Alive."""
        return Beat()


class _WatcherEnd:
    """The link of one node that follows the list."""

    def __init__(self, directory: MasterDirectory) -> None:
        self._directory = directory

    def take(self, hello: Hello) -> None:
        """It brings nothing."""

    def on_open(self, link: Link, welcome: Welcome | None) -> None:
        """It follows."""
        self._directory.watch(link)

    def on_body(self, link: Link, body: bytes) -> None:
        """Nothing but signs of life."""
        messages.decode(body, Beat)

    def on_closed(self, link: Link, reason: str) -> None:
        """Gone."""
        self._directory.unwatch(link)

    def heartbeat(self, link: Link) -> Beat:
        """Alive."""
        return Beat()


class ConfigServerApp:
    """The HTTP side.

    Args:
        is_known: whether the headers of a request show a key that opens the list.
        has_key: a key was configured; without one this machine needs none.
        fail: answers with an error in the one envelope.
    """

    def __init__(
        self,
        directory: MasterDirectory,
        is_known: Callable[[Mapping[bytes, bytes]], bool],
        *,
        has_key: bool,
        fail: Callable[[Send, str, str], Awaitable[None]],
    ) -> None:
        self._directory = directory
        self._is_known = is_known
        self._has_key = has_key
        self._fail = fail

    def web_sockets(self) -> dict[bytes, Callable[[WebSocket], None]]:
        """Path -> who takes the WebSockets opened there."""
        directory = self._directory
        return {MASTER_PATH.encode(): directory.accept_master, WATCH_PATH.encode(): directory.accept_watcher}

    async def __call__(self, scope: dict[str, Any], receive: object, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        path, directory = scope["path"], self._directory
        is_known = path in HEALTH or path in ("/metrics", "/pd_masters")
        if not is_known:
            await self._fail(send, "not_found", f"{path[:200]}: there is no such route on a config_server")
        elif scope["method"] not in ("GET", "HEAD"):
            await self._fail(send, "method_not_allowed", f"{path}: got {scope['method']}, allowed GET")
        elif directory.store.fault and path in ("/health", "/healthz"):
            text = f"the store cannot be used: {directory.store.fault}; the last list stays in force"
            await self._fail(send, "store_down", text)
        elif path in HEALTH:
            await _answer(send, {HEALTH[path]: "Ok" if HEALTH[path] == "message" else "ok"})
        elif not self._may_read(scope):
            message = (
                "the key is missing or wrong; send Authorization: Bearer KEY, or the cluster token as KEY"
            )
            await self._fail(send, "invalid_api_key", message)
        elif path == "/pd_masters":
            await _answer(send, msgspec.to_builtins(_shown(directory.listing())))
        else:
            await _send(send, self._metrics(), b"text/plain; version=0.0.4; charset=utf-8")

    def _metrics(self) -> bytes:
        directory = self._directory
        return (
            "# TYPE lightllm_pd_masters gauge\n"
            f"lightllm_pd_masters {len(directory.listing().pd_masters)}\n"
            "# TYPE lightllm_pd_master_watchers gauge\n"
            f"lightllm_pd_master_watchers {directory.num_watchers}\n"
            "# TYPE lightllm_config_server_store_up gauge\n"
            f"lightllm_config_server_store_up {int(not directory.store.fault)}\n"
        ).encode()

    def _may_read(self, scope: dict[str, Any]) -> bool:
        client = scope.get("client")
        if not self._has_key and client is not None and is_loopback(str(client[0])):
            return True
        return self._is_known(dict(scope["headers"]))


def _shown(listing: MasterList) -> dict[str, Any]:
    """The list without epochs, which are nobody's business."""
    fields = ("node_id", "host", "port", "since")
    masters = [{name: getattr(entry, name) for name in fields} for entry in listing.pd_masters]
    return {"version": listing.version, "pd_masters": masters}


async def _answer(send: Send, body: Any) -> None:
    await _send(send, json.dumps(body, separators=(",", ":")).encode(), b"application/json")


async def _send(send: Send, body: bytes, content_type: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
