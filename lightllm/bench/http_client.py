"""A small HTTP/1.1 client for timing streams: asyncio transports, httptools' parser, server-sent events.

Body bytes are handed to a callback inside the transport's own read event, so a time stamp taken there holds
no task switch. Connections are kept alive and reused. There is no proxy support, on purpose: a benchmark
talks to the server that it names. Knows nothing of prompts or tokens; runs in the client process.
"""

import asyncio
import os
import ssl
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from lightllm.addresses import normalize_host
from lightllm.errors import ConfigError, LightLLMError

BodySink = Callable[[bytes], None]


class CallFailed(LightLLMError):
    """One HTTP call did not end as it should.

    Args:
        kind: what happened: `connect`, `timeout`, `status`, `error_frame`, `cut` or `bad_answer`.
        message: one readable line.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.failure = kind


class Url(NamedTuple):
    """Where a server listens; `path` starts with a slash or is empty, `written_host` is as given."""

    scheme: str
    host: str
    port: int
    path: str
    written_host: str

    @property
    def netloc(self) -> str:
        """Host and port as they stand in a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"{self.scheme}://{self.netloc}"

    @property
    def note(self) -> str:
        """One line on a host that was written in a short form; empty otherwise."""
        changed = self.host != self.written_host
        return f"address {self.written_host} means {self.host}" if changed else ""


def parse_url(text: str) -> Url:
    """Take an http or https address apart; the host is normalised (`127.0.01` becomes `127.0.0.1`).

    Raises:
        ConfigError: not such an address.
    """
    parts = urlsplit(text if "://" in text else "http://" + text)
    try:
        port = parts.port
    except ValueError:
        raise ConfigError(f"--url: got {text!r}, whose port is not in 0..65535") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url: got {text!r}, allowed http://HOST:PORT or https://HOST:PORT with a path")
    if parts.username is not None:
        raise ConfigError("--url: user names and passwords in the address are not supported; use --api_key")
    path = parts.path.rstrip("/") + (f"?{parts.query}" if parts.query else "")
    default_port = 443 if parts.scheme == "https" else 80
    host = normalize_host(parts.hostname)
    return Url(parts.scheme, host, port or default_port, path, parts.hostname)


class Response(NamedTuple):
    """Status and headers (names in lower case) of an answer, and its body unless a sink took it."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def error_text(self) -> str:
        """The server's own words for a refusal, shortened to one line."""
        try:
            envelope = msgspec.json.decode(self.body)
            text = envelope["message"] if "message" in envelope else envelope["error"]["message"]
        except (msgspec.DecodeError, KeyError, TypeError):
            text = self.body.decode(errors="replace")
        return f"HTTP {self.status}: {' '.join(str(text).split())[:300]}"


class SSEParser:
    """Cuts a byte stream into the `data` of server-sent events, with or without a space behind the colon."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take the next bytes; return the data of each event that they complete. Comments are dropped."""
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        events: list[bytes] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class _Connection(asyncio.Protocol):
    """One keep-alive connection. Parses one answer at a time; httptools calls the `on_` methods."""

    def __init__(self) -> None:
        self.is_open = False
        self.is_reused = False
        self.has_answer_begun = False
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Response] | None = None
        self._sink: BodySink | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not checked by isinstance: uvloop's transports only look like asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def send(self, data: bytes, sink: BodySink | None) -> asyncio.Future[Response]:
        """Write a request; the future ends with the last byte of its answer. A 200's body goes to `sink`."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._sink = sink
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._status = self._num_bytes = 0
        self._is_complete = self.has_answer_begun = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        return self._done

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():
            self.close()
            return
        self.has_answer_begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail("bad_answer", f"not a valid HTTP answer: {exc}")
            self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._num_bytes += len(body)
        if self._sink is not None and self._status == 200:
            self._sink(body)
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._status < 200:  # 100 Continue and the like come before the answer
            self._headers = {}
            return
        self._is_complete = True
        if not self._parser.should_keep_alive():
            self.close()
        self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._done is None or self._done.done():
            return
        if self._status >= 200 and not self._has_length():
            self._finish()  # such a body ends where the connection ends
        elif self._status:
            self._fail("cut", f"the server closed the connection after {self._num_bytes} bytes of its answer")
        else:
            self._fail("cut", "the server closed the connection before it answered")

    def close(self) -> None:
        """Drop the connection at once."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def _has_length(self) -> bool:
        return (
            "content-length" in self._headers
            or "chunked" in self._headers.get("transfer-encoding", "").lower()
        )

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(Response(self._status, self._headers, b"".join(self._body)))

    def _fail(self, kind: str, message: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(CallFailed(kind, message))


class HttpClient:
    """Calls to one server over as many kept-alive connections as run at the same time.

    Args:
        url: the server; its path is not used.
        api_key: sent as `Authorization: Bearer` when given.
        timeout_s: upper bound for one call, connecting and the last byte included.
    """

    def __init__(self, url: Url, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._ssl = ssl.create_default_context() if url.scheme == "https" else None
        self._idle: list[_Connection] = []
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._common_headers = f"Host: {url.netloc}\r\nAccept: */*\r\nUser-Agent: lightllm-bench\r\n{key}"

    async def get(self, path: str) -> Response:
        """GET `path`.

        Raises:
            CallFailed: no complete answer of any status arrived.
        """
        return await self._call(f"GET {path} HTTP/1.1\r\n{self._common_headers}\r\n".encode(), None)

    async def post(self, path: str, body: Mapping[str, Any], sink: BodySink | None = None) -> Response:
        """POST `body` as JSON; with `sink`, a 200's body goes there as it arrives.

        Raises:
            CallFailed: no complete answer of any status arrived.
        """
        data = msgspec.json.encode(body)
        head = f"POST {path} HTTP/1.1\r\n{self._common_headers}Content-Type: application/json\r\n"
        return await self._call(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data, sink)

    async def post_json(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST `body` and return the decoded answer.

        Raises:
            CallFailed: no answer, another status than 200, or not JSON.
        """
        return _decode_answer(path, await self.post(path, body))

    async def get_json(self, path: str) -> Any:
        """GET `path` and return the decoded answer; raises as `post_json`."""
        return _decode_answer(path, await self.get(path))

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _call(self, data: bytes, sink: BodySink | None) -> Response:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchange(data, sink)
        except TimeoutError:
            raise CallFailed("timeout", f"no complete answer within {self._timeout_s:g} s") from None

    async def _exchange(self, data: bytes, sink: BodySink | None) -> Response:
        while True:
            connection = await self._connect()
            try:
                response = await connection.send(data, sink)
            except CallFailed:
                # A kept-alive connection that the server closed while it idled is no failure of this request.
                if connection.is_reused and not connection.has_answer_begun:
                    continue
                raise
            except BaseException:
                connection.close()
                raise
            if connection.is_open:
                self._idle.append(connection)
            return response

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                connection.is_reused = True
                return connection
        loop, url = asyncio.get_running_loop(), self._url
        try:
            _, fresh = await loop.create_connection(_Connection, url.host, url.port, ssl=self._ssl)
        except OSError as exc:
            reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else str(exc)
            raise CallFailed("connect", f"cannot connect to {url.netloc}: {reason}") from None
        return fresh


def _decode_answer(path: str, response: Response) -> Any:
    if response.status != 200:
        raise CallFailed("status", f"{path}: {response.error_text()}")
    try:
        return msgspec.json.decode(response.body)
    except msgspec.DecodeError:
        raise CallFailed("bad_answer", f"{path}: the answer is not JSON") from None
