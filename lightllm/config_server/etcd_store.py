"""The list of pd_masters in an etcd, which several config_servers share.

The etcd may be away at any time: the last list stays in force, and what it lacks is written once it is back.
Runs in the event loop of the config_server; knows no link.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable

import msgspec

from lightllm.cluster_link import signature
from lightllm.cluster_messages import MasterEntry
from lightllm.config_server.etcd import EtcdClient
from lightllm.errors import ClusterError
from lightllm.messages import Part

logger = logging.getLogger(__name__)

LEASE_S = 15
TURN_S = 4.0
REOPEN_S = 1.0


class _Kept(Part, frozen=True):
    """What stands in etcd behind a key, as JSON; `mac` shows that its writer knew the cluster token."""

    entry: MasterEntry
    mac: bytes


class EtcdStore:
    """The list that all config_servers of a cluster keep in one etcd.

    A turn renews the lease, deletes and writes what has changed here, and reads the whole list. Turns are
    taken every `turn_s`, and at once when something has changed here or there; a watch says no more than
    that.

    Args:
        lease_s: entries of a config_server that died are deleted after this long.
        turn_s: a fraction of it, so that some renewals may fail.
    """

    def __init__(
        self, client: EtcdClient, token: bytes, *, lease_s: int = LEASE_S, turn_s: float = TURN_S
    ) -> None:
        self.fault = "not yet asked"
        self.on_change: Callable[[list[MasterEntry]], None] = lambda entries: None
        self._client = client
        self._token = token
        # Clusters that share an etcd, but no token, do not see each other.
        self._prefix = f"/lightllm/{signature(token, 'cluster').hex()}/pd_masters/".encode()
        self._own: dict[str, MasterEntry] = {}  # linked to this config_server
        self._seen: dict[str, MasterEntry] = {}  # what the last turn has read
        self._unwritten: set[str] = set()
        self._leaving: set[str] = set()
        self._ignored: set[bytes] = set()
        self._shown: list[MasterEntry] = []
        self._lease = ""
        self._lease_s = lease_s
        self._turn_s = turn_s
        self._renewed_s = 0.0
        self._is_stopping = False
        self._wake = asyncio.Event()

    async def check(self) -> None:
        """Take one turn.

        Raises:
            EtcdUnavailable: no etcd answers.
        """
        await self._turn()
        self.fault = ""

    async def run(self) -> None:
        """Take turns until cancelled, whether an etcd answers or not."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._take_turns())
                group.create_task(self._watch())
        finally:
            await self._client.close()

    def put(self, entry: MasterEntry) -> None:
        """List a master: at once for those who ask here, for others once it is written."""
        self._own[entry.node_id] = entry
        self._unwritten.add(entry.node_id)
        self._leaving.discard(entry.node_id)
        self._show()
        self._wake.set()

    def remove(self, entry: MasterEntry) -> None:
        """List it no more; a later life, here or at another config_server, stays."""
        if self._is_stopping or self._own.get(entry.node_id) != entry:
            return
        del self._own[entry.node_id]
        self._unwritten.discard(entry.node_id)
        self._leaving.add(entry.node_id)
        if self._seen.get(entry.node_id) == entry:
            del self._seen[entry.node_id]
        self._show()
        self._wake.set()

    def stop(self) -> None:
        """Leave the entries to their lease; masters register again, here or elsewhere, before it ends."""
        self._is_stopping = True

    async def _take_turns(self) -> None:
        while True:
            try:
                await self._turn()
            except ClusterError as error:
                if not self.fault:
                    logger.error("no etcd answers: %s; the last list stays in force, trying again", error)
                self.fault = str(error)
            else:
                if self.fault:
                    logger.info("etcd answers")
                self.fault = ""
            try:
                await asyncio.wait_for(self._wake.wait(), self._turn_s)
            except TimeoutError:
                pass

    async def _turn(self) -> None:
        self._wake.clear()
        await self._keep_lease()
        for name in tuple(self._leaving):
            # What was written under a lease that is gone is gone, too.
            if self._lease:
                await self._client.delete(self._key(name), self._lease)
            self._leaving.discard(name)
        listed = self._verified(await self._client.read(self._prefix))
        self._seen = {name: entry for name, entry in listed.items() if name not in self._leaving}
        # An etcd that was set up anew knows nothing of ours.
        self._unwritten |= self._own.keys() - self._seen.keys()
        for name in tuple(self._unwritten):
            await self._write(name)
        self._show()

    async def _keep_lease(self) -> None:
        """Have a lease if there is anything to write, and renew it in time."""
        now = time.monotonic()
        if self._lease and now - self._renewed_s >= self._turn_s / 2:
            if await self._client.renew(self._lease):
                self._renewed_s = now
            else:
                self._lease = ""
        if not self._lease and self._own:
            self._lease, self._renewed_s = await self._client.grant(self._lease_s), now
            self._unwritten |= self._own.keys()

    async def _write(self, name: str) -> None:
        entry = self._own.get(name)
        if entry is None or not self._lease:
            return
        kept = _Kept(entry=entry, mac=self._mac(entry))
        if not await self._client.write(self._key(name), msgspec.json.encode(kept), self._lease):
            self._lease = ""
            self._wake.set()
        elif self._own.get(name) == entry:
            self._unwritten.discard(name)

    def _verified(self, pairs: dict[bytes, bytes]) -> dict[str, MasterEntry]:
        """The entries that this cluster has written; others are ignored, and named once."""
        found = {}
        for key, value in pairs.items():
            try:
                kept = msgspec.json.decode(value, type=_Kept)
            except msgspec.DecodeError as error:
                self._ignore(key, str(error))
                continue
            is_ours = hmac.compare_digest(kept.mac, self._mac(kept.entry))
            if is_ours and key == self._key(kept.entry.node_id):
                found[kept.entry.node_id] = kept.entry
            else:
                self._ignore(key, "its signature is not made with this cluster's token")
        return found

    def _ignore(self, key: bytes, reason: str) -> None:
        if key not in self._ignored:
            self._ignored.add(key)
            logger.warning("etcd: %r is ignored: %s", key[len(self._prefix) :][:80], reason)

    def _key(self, name: str) -> bytes:
        return self._prefix + name.encode()

    def _mac(self, entry: MasterEntry) -> bytes:
        return signature(self._token, "master entry", msgspec.json.encode(entry))

    async def _watch(self) -> None:
        """Have a turn taken whenever somebody has written."""
        while True:
            try:
                async for _ in self._client.changes(self._prefix):
                    self._wake.set()
            except ClusterError as error:
                # The turn will find out whether another member answers, and say so if none does.
                logger.debug("the watch of etcd has ended: %s", error)
                self._wake.set()
                await asyncio.sleep(REOPEN_S)

    def _show(self) -> None:
        """Tell the list if it is another one. What is linked here is known best here."""
        merged = {**self._seen, **self._own}
        shown = sorted(merged.values(), key=lambda entry: (entry.since, entry.node_id))
        if shown != self._shown:
            self._shown = shown
            self.on_change(shown)
