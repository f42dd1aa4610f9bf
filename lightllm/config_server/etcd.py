"""The few calls of etcd that a directory needs, over its HTTP/JSON gateway (API v3, etcd 3.4 and later).

Members are tried in turn, first the one that answered last; every call ends within a bound. Knows keys,
values and leases, nothing of what they mean. Runs in the event loop of the config_server; imported only where
the store is an etcd, since httpx is an extra (`lightllm[etcd]`).
"""

from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

import httpx
import msgspec

from lightllm.addresses import join_address
from lightllm.errors import ClusterError

CONNECT_LIMIT_S = 2.0
ANSWER_LIMIT_S = 3.0
# A watch that brings nothing for so long is opened anew: its connection may be dead without having closed.
QUIET_LIMIT_S = 30.0
NOT_FOUND = 5  # gRPC's code, which the gateway passes on
MAX_SHOWN = 200


class EtcdUnavailable(ClusterError):
    """No member has answered as an etcd does; the message says what each of them did."""


class _LeaseGone(Exception):
    """What the call was for has expired."""


class _Reply(msgspec.Struct, frozen=True):
    """Base of all answers: an etcd names itself in each."""

    header: msgspec.Raw


class _Pair(msgspec.Struct, frozen=True):
    key: bytes  # in JSON as base64, here and below
    value: bytes = b""


class _Pairs(_Reply, frozen=True):
    kvs: list[_Pair] = []


class _Granted(_Reply, frozen=True, rename={"lease": "ID"}):
    lease: str


class _Renewed(msgspec.Struct, frozen=True):
    class Result(_Reply, frozen=True, rename={"ttl_s": "TTL"}):
        ttl_s: int = 0

    result: Result


class _Fault(msgspec.Struct, frozen=True):
    code: int
    message: str


_AnyReply = TypeVar("_AnyReply", bound=msgspec.Struct)


class EtcdClient:
    """An etcd, by the addresses (host, port) of one or several of its members."""

    def __init__(self, addresses: Sequence[tuple[str, int]]) -> None:
        self._members = [join_address(*address) for address in addresses]
        limits = httpx.Timeout(ANSWER_LIMIT_S, connect=CONNECT_LIMIT_S)
        # Not through a proxy that the environment names: what it is for is the outside.
        self._http = httpx.AsyncClient(timeout=limits, trust_env=False)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def read(self, prefix: bytes) -> dict[bytes, bytes]:
        """All keys that begin so, with their values."""
        reply = await self._call("kv/range", _below(prefix), _Pairs)
        return {pair.key: pair.value for pair in reply.kvs}

    async def write(self, key: bytes, value: bytes, lease: str) -> bool:
        """Write a key that goes when its lease does; False if that one is gone already."""
        try:
            await self._call("kv/put", {"key": key, "value": value, "lease": lease}, _Reply)
        except _LeaseGone:
            return False
        return True

    async def delete(self, key: bytes, lease: str) -> None:
        """Delete a key if it is this lease's."""
        compare = {"key": key, "target": "LEASE", "result": "EQUAL", "lease": lease}
        delete = {"request_delete_range": {"key": key}}
        await self._call("kv/txn", {"compare": [compare], "success": [delete]}, _Reply)

    async def grant(self, ttl_s: int) -> str:
        """A new lease; its keys are deleted when it has not been renewed for so long."""
        return (await self._call("lease/grant", {"TTL": ttl_s}, _Granted)).lease

    async def renew(self, lease: str) -> bool:
        """Renew a lease; False if it is gone already."""
        try:
            return (await self._call("lease/keepalive", {"ID": lease}, _Renewed)).result.ttl_s > 0
        except _LeaseGone:
            return False

    async def changes(self, prefix: bytes) -> AsyncIterator[None]:
        """Yields once when keys that begin so are watched, and again at each change of one.

        Ends when there was none for QUIET_LIMIT_S.

        Raises:
            EtcdUnavailable: the member is gone.
        """
        limits = httpx.Timeout(QUIET_LIMIT_S, connect=CONNECT_LIMIT_S)
        member, body = self._members[0], msgspec.json.encode({"create_request": _below(prefix)})
        try:
            async with self._http.stream(
                "POST", _url(member, "watch"), content=body, timeout=limits
            ) as reply:
                reply.raise_for_status()
                async for _ in reply.aiter_lines():
                    yield
        except httpx.ReadTimeout:
            return
        except httpx.HTTPError as error:
            raise EtcdUnavailable(f"{member}: {_reason(error)}") from error

    async def _call(self, path: str, body: dict[str, object], kind: type[_AnyReply]) -> _AnyReply:
        """One call, at the first member that serves it; that one is asked first from then on.

        Raises:
            EtcdUnavailable: none does.
            _LeaseGone: etcd does not know the lease.
        """
        content = msgspec.json.encode(body)
        reasons = []
        for member in tuple(self._members):
            try:
                answer = await self._http.post(_url(member, path), content=content)
                found = _decode(answer, kind)
            except (httpx.HTTPError, EtcdUnavailable) as error:
                reasons.append(f"{member}: {_reason(error)}")
                continue
            self._members.remove(member)
            self._members.insert(0, member)
            return found
        raise EtcdUnavailable("; ".join(reasons))


def _decode(answer: httpx.Response, kind: type[_AnyReply]) -> _AnyReply:
    try:
        if answer.status_code == httpx.codes.OK:
            # Numbers of 64 bits come as texts.
            return msgspec.json.decode(answer.content, type=kind, strict=False)
        fault = msgspec.json.decode(answer.content, type=_Fault)
    except msgspec.DecodeError as error:
        raise EtcdUnavailable(f"it answers HTTP {answer.status_code}, but not as an etcd does") from error
    if fault.code == NOT_FOUND:
        raise _LeaseGone
    raise EtcdUnavailable(f"it refuses: {fault.message[:MAX_SHOWN]}")


def _reason(error: Exception) -> str:
    """Time-outs have no text of their own."""
    return str(error) or type(error).__name__


def _url(member: str, path: str) -> str:
    return f"http://{member}/v3/{path}"


def _below(prefix: bytes) -> dict[str, object]:
    """All keys that begin so, as etcd writes a range: up to the first that does not."""
    return {"key": prefix, "range_end": prefix[:-1] + bytes([prefix[-1] + 1])}
