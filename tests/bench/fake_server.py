"""An HTTP server of fixed answers for client tests: both stream families, and every way in which they fail.

Runs in a thread with its own loop, because the programs under test own theirs. Text is counted in bytes, with
one token more for the start of the prompt.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Self

BOS_TOKENS = 1
TEMPLATE_TOKENS = 7
STREAMS = ("/generate_stream", "/v1/completions", "/v1/chat/completions")
VOCAB_SIZE = 256


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: dict


class Cut(Exception):
    """Raised by an answer to close the connection there."""


Answer = Iterator[bytes]
Route = Callable[[Request], Answer]


def whole(body: object, status: int = 200, headers: str = "") -> Answer:
    """An answer with a length."""
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    yield f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data


def chunked(frames: list[bytes], *, is_cut: bool = False) -> Answer:
    """A chunked event stream; `is_cut` leaves out its end and closes."""
    yield b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    for frame in frames:
        yield f"{len(frame):x}\r\n".encode() + frame + b"\r\n"
    if is_cut:
        raise Cut
    yield b"0\r\n\r\n"


def native_frames(num_tokens: int, prompt_tokens: int) -> list[bytes]:
    """The frames of /generate_stream."""
    frames = []
    for count in range(1, num_tokens + 1):
        token = {"id": 5, "text": "x", "count_output_tokens": count, "prompt_tokens": prompt_tokens}
        is_last = count == num_tokens
        frame = {"token": token, "finished": is_last, "finish_reason": "length" if is_last else None}
        frames.append(b"data:" + json.dumps(frame).encode() + b"\n\n")
    return frames


def openai_frames(num_tokens: int, prompt_tokens: int, *, is_chat: bool) -> list[bytes]:
    """The frames of the two OpenAI routes: two tokens share a chunk, so that frames are no token count."""

    def choice(text: str, reason: str | None) -> dict:
        delta = {"content": text} if text else {}
        return {"index": 0, "finish_reason": reason} | ({"delta": delta} if is_chat else {"text": text})

    chunks: list[dict] = [{"choices": [choice("xy", None)], "usage": None} for _ in range(num_tokens // 2)]
    if is_chat:
        chunks.insert(
            0, {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
        )
    chunks.append({"choices": [choice("", "length")], "usage": None})
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens}
    chunks.append({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 3}}})
    return [*(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks), b"data: [DONE]\n\n"]


def generate(request: Request) -> Answer:
    num, length = (
        request.body["parameters"]["max_new_tokens"],
        len(request.body["inputs"].encode()) + BOS_TOKENS,
    )
    return chunked(native_frames(num, length))


def complete(request: Request) -> Answer:
    length = len(request.body["prompt"].encode()) + BOS_TOKENS
    return chunked(openai_frames(request.body["max_tokens"], length, is_chat=False))


def chat(request: Request) -> Answer:
    length = sum(len(message["content"].encode()) for message in request.body["messages"]) + TEMPLATE_TOKENS
    return chunked(openai_frames(request.body["max_tokens"], length, is_chat=True))


def tokenize(request: Request) -> Answer:
    body = request.body
    if "messages" in body:
        data, more = body["messages"][0]["content"].encode(), TEMPLATE_TOKENS
    else:
        data, more = body["prompt"].encode(), BOS_TOKENS if body.get("add_special_tokens", True) else 0
    return whole({"tokens": [0] * more + list(data), "count": len(data) + more, "max_model_len": 4096})


def detokenize(request: Request) -> Answer:
    tokens = request.body["tokens"]
    if max(tokens) >= VOCAB_SIZE:
        return whole({"message": f"id {max(tokens)} is not in the vocabulary"}, 400)
    return whole({"prompt": bytes(tokens).decode(errors="replace")})


def models(request: Request) -> Answer:
    return whole({"object": "list", "data": [{"id": "tiny", "owned_by": "lightllm"}]})


def metrics(request: Request) -> Answer:
    info = 'lightllm_build_info{model="tiny",version="9.9"} 1.0'
    return whole(f'{info}\nlightllm_cached_tokens_total{{model="tiny"}} 40.0\n')


ROUTES: dict[str, Route] = {
    "/generate_stream": generate,
    "/v1/completions": complete,
    "/v1/chat/completions": chat,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
    "/v1/models": models,
    "/metrics": metrics,
}


@dataclass
class FakeServer:
    """Serves `ROUTES`, some of them replaced, on a free loopback port between `with` and its end."""

    replaced: dict[str, Route] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    num_connections: int = 0
    num_open_streams: int = 0
    max_open_streams: int = 0
    delay_s: float = 0.0
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        is_up = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(is_up),))
        self._thread.start()
        assert is_up.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def drop_connections(self) -> None:
        """Close all connections from this side, and wait until that is done."""

        async def drop() -> None:
            for writer in self._writers:
                writer.transport.abort()

        asyncio.run_coroutine_threadsafe(drop(), self._loop).result(10)

    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    async def _serve(self, is_up: threading.Event) -> None:
        tasks: set[asyncio.Task] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.add(asyncio.ensure_future(self._talk(reader, writer)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        is_up.set()
        await self._stop.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.append(writer)
        try:
            while True:
                request = await self._read(reader)
                self.requests.append(request)
                route = (ROUTES | self.replaced).get(request.path, lambda _: whole({"message": "no"}, 404))
                await self._answer(route(request), writer, int(request.path in STREAMS))
        except (asyncio.IncompleteReadError, ConnectionError, Cut):
            pass  # the client has gone, or the answer ends here
        finally:
            writer.transport.abort()

    async def _answer(self, answer: Answer, writer: asyncio.StreamWriter, num_streams: int) -> None:
        self.num_open_streams += num_streams
        self.max_open_streams = max(self.max_open_streams, self.num_open_streams)
        try:
            for part in answer:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(self.delay_s)
        except Cut:
            await asyncio.sleep(0.05)  # abort() would drop what is not yet written
            raise
        finally:
            self.num_open_streams -= num_streams

    async def _read(self, reader: asyncio.StreamReader) -> Request:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split()
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Request(method, path, headers, json.loads(body) if body else {})
