"""One HTTP request while it is handled: its body in, its answer out, and what is known of it for the log.

Handlers get a `Call` and nothing else of ASGI. The checks here come in the published order: size, content
type, body, JSON, fields; the key is checked before (app.py), tokenization and length after (the routes).
"""

import asyncio
import logging
import re
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from lightllm.api.bodies import Bodies, BodyShare
from lightllm.api.errors import envelope, error_headers
from lightllm.api.metrics import Metrics
from lightllm.api.parsing import parse_request
from lightllm.api.request_log import RequestLog, RequestRecord
from lightllm.api.transport import Header, Receive, Send, transport_of
from lightllm.config import Config
from lightllm.errors import CapacityError, LightLLMError, RequestError
from lightllm.frontend.engine_client import EngineClientLike
from lightllm.frontend.generation import Generation
from lightllm.frontend.generator import Generator, new_request_id
from lightllm.frontend.node_agent import NodeAgent
from lightllm.frontend.node_server import NodeServer
from lightllm.frontend.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BODY_LIMIT_S = 30.0
DRAIN_RETRY_S = 5
PING_S = 15.0
MAX_NAMED_FIELDS = 32
MAX_LOGGED_FIELDS = 1000
JSON = b"application/json"
EVENT_STREAM = b"text/event-stream"

_SAFE_LABEL = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_UNSAFE_IN_HEADER = re.compile(r"[^A-Za-z0-9_.\-]")
T = TypeVar("T", bound=msgspec.Struct)


class ClientGone(Exception):
    """The client left before its answer was complete; only the log and a metric hear of it."""


@dataclass
class AppContext:
    """Everything the routes work with; made once by the frontend process.

    Attributes:
        model_names: served names, the first is shown.
        sampling_defaults: what the model's generation_config replaces (do_sample, temperature, top_p, top_k,
            the penalties).
        cluster: the nodes of a pd_master, None in other roles.
        agent: the links of a prefill or decode node to its masters, None in other roles.
        is_draining: set when nothing new is taken any more.
        bodies: the room for what clients send.
    """

    config: Config
    tokenizer: Tokenizer
    engine: EngineClientLike
    generator: Generator
    metrics: Metrics
    model_names: list[str]
    requests: RequestLog
    version: str = ""
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    cluster: NodeServer | None = None
    agent: NodeAgent | None = None
    is_draining: bool = False
    created_unix_s: int = field(default_factory=lambda: int(time.time()))
    logged_fields: set[str] = field(default_factory=set)
    bodies: Bodies = field(init=False)

    def __post_init__(self) -> None:
        self.bodies = Bodies(self.config.server.max_request_bytes)

    def require_serving(self) -> None:
        """Raise the 503 error that says why no request is taken now."""
        if self.is_draining:
            message = "the server is stopping and takes no new requests; send it to another one"
            raise CapacityError(message, code="draining", retry_after_s=DRAIN_RETRY_S)
        self.engine.require_up()

    def require_ready(self) -> None:
        """Raise the 503 error that says why no client should be sent here; more than `require_serving`."""
        self.require_serving()
        if self.cluster is not None:
            self.cluster.router.require_pair()
        if self.agent is not None and not self.agent.is_registered:
            states = "; ".join(self.agent.states()) or "no pd_master is known yet"
            message = f"not registered at any pd_master: {states}"
            raise CapacityError(message, code="loading", retry_after_s=DRAIN_RETRY_S)


class Call:
    """One HTTP request and its answer.

    Attributes:
        request_id: ours, `req_` + 32 hex digits.
        label: the client's own X-Request-Id, if it is short and safe.
        path_params: filled in by the router.
        client: where frames of a stream go.
        generation: what runs for it, if anything does.
        is_open: the status line has been sent.
    """

    def __init__(self, context: AppContext, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        self.context = context
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.started_s = time.monotonic()
        self.request_id = new_request_id()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        label = self.headers.get(b"x-request-id", b"").decode("latin-1")
        self.label = label if _SAFE_LABEL.fullmatch(label) else ""
        self.client = transport_of(scope, receive, send)
        self.generation: Generation | None = None
        self.is_open = False
        self.status = 0
        self.code = ""
        self.ignored: list[str] = []
        self._receive = receive
        self._send = send

    @property
    def wants_json(self) -> bool:
        """Whether the client asks for JSON where a person would get a page."""
        return b"application/json" in self.headers.get(b"accept", b"")

    @property
    def path_params(self) -> dict[str, str]:
        """Parts of the path, by name."""
        params: dict[str, str] = self.scope.get("path_params", {})
        return params

    def query(self) -> dict[str, str]:
        """Parameters of the query string; of repeated ones the last."""
        return dict(urllib.parse.parse_qsl(self.scope.get("query_string", b"").decode("latin-1")))

    # ------------------------------------------------------------ request

    async def _body(self, share: BodyShare) -> bytearray:
        """Read the whole body, within its bounds of size, type, time and common room.

        Raises:
            LightLLMError: too_large, bad_content_type, queue_full, body_timeout, or bad_json for broken
                chunks.
            ClientGone: the client left while sending.
        """
        limit = self.context.config.server.max_request_bytes
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        self._check_content_type()
        if length.isdigit():
            share.expect(int(length))
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_LIMIT_S):
                while True:
                    message = await self._receive()
                    if self.client.fault is not None:
                        raise self.client.fault
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    piece = message.get("body", b"")
                    if len(body) + len(piece) > limit:
                        raise _too_large(limit)
                    share.take(len(piece))
                    body += piece
                    if not message.get("more_body", False):
                        return body
        except TimeoutError:
            message = f"the body was not complete after {BODY_LIMIT_S:.0f} s"
            raise LightLLMError(message, code="body_timeout") from None

    async def parse(self, kind: type[T]) -> T:
        """Read the body and convert it; unknown fields are named in the answer and logged once.

        Raises:
            LightLLMError: any of the errors of `_body` and `parse_request`.
        """
        strict = self.context.config.server.strict_fields
        with self.context.bodies.share() as share:
            value, self.ignored = parse_request(await self._body(share), kind, strict_fields=strict)
        self._log_ignored()
        return value

    def _check_content_type(self) -> None:
        if self.headers.get(b"content-encoding"):
            raise RequestError("content-encoding: bodies are taken as they are", code="bad_content_type")
        given = self.headers.get(b"content-type", b"").decode("latin-1")
        kind, _, parameters = given.partition(";")
        if kind.strip().lower() != "application/json":
            got = f"got {given[:80]!r}" if given else "it is missing"
            message = f"content-type: {got}; send application/json"
            raise RequestError(message, code="bad_content_type")
        for parameter in parameters.split(";"):
            name, _, charset = parameter.partition("=")
            if name.strip().lower() == "charset" and charset.strip(' "').lower() not in ("utf-8", "utf8"):
                message = f"content-type: got charset {charset.strip()[:40]!r}, allowed utf-8"
                raise RequestError(message, code="bad_content_type")

    def _log_ignored(self) -> None:
        logged = self.context.logged_fields
        for name in self.ignored:
            if name not in logged and len(logged) < MAX_LOGGED_FIELDS:
                logged.add(name)
                logger.warning("field %r of %s is unknown and has no effect", name[:80], self.path)

    # ------------------------------------------------------------ answer

    async def answer(
        self, body: bytes, *, status: int = 200, content_type: bytes = JSON, headers: tuple[Header, ...] = ()
    ) -> None:
        """Send a whole answer."""
        self.status = status
        self.is_open = True
        length = (b"content-length", str(len(body)).encode())
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", content_type), length, *self._common_headers(), *headers],
            }
        )
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def answer_json(self, value: Any, *, status: int = 200) -> None:
        """Send a JSON answer: compact, UTF-8, not escaped to ASCII."""
        await self.answer(msgspec.json.encode(value), status=status)

    async def fail(self, error: LightLLMError, *, allow: str = "") -> None:
        """Send an error answer, or cut the connection if another answer has begun."""
        self.code = error.code
        if self.is_open:
            await self.client.finish(close=True)
            return
        await self.answer(
            envelope(error), status=error.kind.status, headers=tuple(error_headers(error, allow))
        )

    def _common_headers(self) -> list[Header]:
        headers = [(b"x-request-id", (self.label or self.request_id).encode())]
        if self.ignored:
            names = [_UNSAFE_IN_HEADER.sub("?", name[:64]) for name in self.ignored[:MAX_NAMED_FIELDS]]
            headers.append((b"x-ignored-fields", ", ".join(names).encode()))
        return headers

    # ------------------------------------------------------------ generations

    def watch(self, generation: Generation) -> None:
        """Note what runs for this call; a client that leaves cancels it."""
        self.generation = generation
        self.context.requests.add(RequestRecord(self.request_id, self.label, self.path, generation))
        self.client.on_disconnect(generation.abort)

    async def wait_finished(self, generation: Generation) -> None:
        """Wait for the whole generation.

        Raises:
            LightLLMError: it failed.
            ClientGone: nobody waits for the answer any more.
        """
        await generation.finished
        if self.client.is_gone:
            raise ClientGone
        if generation.error is not None:
            raise generation.error

    async def stream(self, generation: Generation, *, pings: bool = False) -> None:
        """Hold the 200 for the first output, then let frames through until the end.

        Frames are written by the generation's `emit`; `pings` adds SSE comments while there are none.

        Raises:
            LightLLMError: it failed before the status line.
            ClientGone: the client left.
        """
        await generation.wait_first()
        self.status = 200
        self.is_open = True
        headers = [
            (b"content-type", EVENT_STREAM),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *self._common_headers(),
        ]
        await self.client.open(200, headers)
        while not generation.finished.done():
            silent_s = time.monotonic() - self.client.written_s
            if pings and silent_s >= PING_S:
                self.client.write(b": ping\n\n")
                continue
            await asyncio.wait({generation.finished}, timeout=PING_S - silent_s if pings else None)
        if self.client.is_gone:
            raise ClientGone
        self.code = generation.error.code if generation.error is not None else ""

    async def finish_stream(self, generation: Generation) -> None:
        """End the body; after an error the connection, too."""
        await self.client.finish(close=generation.error is not None)


def _too_large(limit: int) -> RequestError:
    message = f"the body is larger than {limit} bytes; shorten it or raise --max_request_bytes"
    return RequestError(message, code="too_large")
