"""Asks a running server who it is: model, name, version, and its count of cached prompt tokens.

Every answer is optional, so that other servers of the same dialect can be measured too. Only reads.
"""

import re
from typing import NamedTuple

import msgspec

from lightllm.bench.http_client import CallFailed, HttpClient, Response

_CACHED = re.compile(r"^lightllm_cached_tokens(?:_total)?(?:\{[^}]*\})? ([0-9.e+]+)", re.MULTILINE)
_VERSION = re.compile(r"^lightllm_build_info\{[^}]*version=\"([^\"]*)\"", re.MULTILINE)


class ServerInfo(NamedTuple):
    """Identity of a server; empty texts where it did not say."""

    model: str
    owner: str
    version: str
    header: str

    def __str__(self) -> str:
        name = " ".join(part for part in (self.owner or self.header, self.version) if part) or "unknown"
        return f"{name}, model {self.model or 'unknown'}"


class _Model(msgspec.Struct):
    id: str
    owned_by: str = ""


class _ModelList(msgspec.Struct):
    data: list[_Model]


async def ask_server(client: HttpClient, prefix: str) -> ServerInfo:
    """Identity of the server.

    Raises:
        CallFailed: nothing answers at the address (kind `connect`), or it wants a key (kind `status`).
    """
    models = await _get(client, prefix + "/v1/models")
    if models is not None and models.status == 401:
        raise CallFailed("status", f"{models.error_text()}; give the server's key with --api_key")
    model = owner = ""
    if models is not None and models.status == 200:
        try:
            first = msgspec.json.decode(models.body, type=_ModelList).data[0]
            model, owner = first.id, first.owned_by
        except (msgspec.DecodeError, IndexError):
            pass  # some other server's list; the run works without it
    version = _VERSION.search(await _metrics(client, prefix))
    header = models.headers.get("server", "") if models is not None else ""
    return ServerInfo(model, owner, version.group(1) if version else "", header)


async def cached_tokens(client: HttpClient, prefix: str) -> int | None:
    """Prompt tokens that the server has found in its prefix cache since it started; None if unknown."""
    counts = _CACHED.findall(await _metrics(client, prefix))
    return int(sum(float(count) for count in counts)) if counts else None


async def _metrics(client: HttpClient, prefix: str) -> str:
    response = await _get(client, prefix + "/metrics")
    return response.body.decode(errors="replace") if response is not None and response.status == 200 else ""


async def _get(client: HttpClient, path: str) -> Response | None:
    try:
        return await client.get(path)
    except CallFailed as exc:
        if exc.failure == "connect":
            raise
        return None
