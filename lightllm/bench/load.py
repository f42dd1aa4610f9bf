"""The load driver: sends jobs, closed loop or at a rate, and records what each answer took and held.

Tokens are what the server says they are (`count_output_tokens`, `usage`), never the number of frames. A
request that failed is a record of its kind, not the end of the run. Knows nothing of making prompts or of
printing.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from lightllm.bench.http_client import CallFailed, HttpClient, SSEParser
from lightllm.bench.workload import Job

WARM_UP_OUTPUT_LEN = 4


class RequestResult(msgspec.Struct, kw_only=True):
    """What became of one job. Times in seconds; token counts are the server's, None where it did not say."""

    index: int
    asked_tokens: int
    failure: str | None = None
    message: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    request_s: float = 0.0
    first_token_s: float = 0.0
    decode_token_s: float | None = None
    gaps_s: list[float] = []


class _Error(msgspec.Struct):
    message: str = "no message"
    code: str | None = None


class _NativeToken(msgspec.Struct):
    count_output_tokens: int | None = None
    prompt_tokens: int | None = None
    prompt_cache_len: int | None = None


class _NativeFrame(msgspec.Struct):
    token: _NativeToken = msgspec.field(default_factory=_NativeToken)
    finished: bool = False
    finish_reason: str | int | None = None
    error: _Error | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def has_tokens(self) -> bool:
        delta = self.delta or _Delta()
        return bool(self.text or delta.content or delta.reasoning_content)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _OpenAIFrame(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_NATIVE_DECODER = msgspec.json.Decoder(_NativeFrame)
_OPENAI_DECODER = msgspec.json.Decoder(_OpenAIFrame)


class StreamReader:
    """Reads the frames of one answer as they arrive. Subclasses know one family of frames.

    `stamps` holds the arrival of each frame with tokens; `is_finished` says that the last frame was seen.
    """

    def __init__(self, count_tokens: Callable[[int], None]) -> None:
        self.stamps: list[float] = []
        self.failed: CallFailed | None = None
        self.is_finished = False
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.output_tokens = 0
        self.first_frame_tokens = 1
        self._count_tokens = count_tokens
        self._events = SSEParser()

    def feed(self, chunk: bytes) -> None:
        """Take body bytes at the moment of their arrival; never raises."""
        now = time.perf_counter()
        for data in self._events.feed(chunk):
            if self.failed is not None:
                return
            try:
                self.read(data, now)
            except msgspec.DecodeError as exc:
                frame = data[:80].decode(errors="replace")
                self.failed = CallFailed("bad_answer", f"a frame is not as agreed: {exc}: {frame}")

    def read(self, data: bytes, now: float) -> None:
        """Take one frame."""
        raise NotImplementedError

    def fail(self, error: _Error) -> None:
        """Note an error frame."""
        code = f" ({error.code})" if error.code else ""
        self.failed = CallFailed("error_frame", error.message[:300] + code)


class NativeReader(StreamReader):
    """`data:{...}`: one frame per token; the one with `finished` is the last."""

    def read(self, data: bytes, now: float) -> None:
        frame = _NATIVE_DECODER.decode(data)
        if frame.error is not None:
            self.fail(frame.error)
            return
        self.stamps.append(now)
        token = frame.token
        if token.count_output_tokens is None:
            self.failed = CallFailed("bad_answer", "a frame has no count_output_tokens")
            return
        if len(self.stamps) == 1:
            self.first_frame_tokens = token.count_output_tokens
        self._count_tokens(token.count_output_tokens - self.output_tokens)
        self.output_tokens = token.count_output_tokens
        self.prompt_tokens = token.prompt_tokens
        if token.prompt_cache_len is not None:
            self.cached_tokens = token.prompt_cache_len
        self.is_finished = frame.finished
        if frame.finish_reason in ("abort", "error"):
            self.fail(_Error(f"the request ended with finish_reason {frame.finish_reason}"))


class OpenAIReader(StreamReader):
    """`data: {...}` of completions and chat completions; `[DONE]` is the last."""

    def read(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.is_finished = True
            if self.prompt_tokens is None:
                self.failed = CallFailed(
                    "bad_answer", "the stream had no usage: its tokens cannot be counted"
                )
            return
        frame = _OPENAI_DECODER.decode(data)
        if frame.error is not None:
            self.fail(frame.error)
            return
        if frame.usage is not None:
            self._count_tokens(frame.usage.completion_tokens - self.output_tokens)
            self.output_tokens = frame.usage.completion_tokens
            self.prompt_tokens = frame.usage.prompt_tokens
            if frame.usage.prompt_tokens_details is not None:
                self.cached_tokens = frame.usage.prompt_tokens_details.cached_tokens
        for choice in frame.choices:
            # A final chunk without text is the first sign of tokens that had no text at all.
            if choice.has_tokens() or (choice.finish_reason and not self.stamps):
                self.stamps.append(now)
            if choice.finish_reason in ("abort", "error"):
                self.fail(_Error(f"the request ended with finish_reason {choice.finish_reason}"))


def _native_body(prompt: str, num_tokens: int, model: str) -> dict[str, Any]:
    return {
        "inputs": prompt,
        "parameters": {"do_sample": False, "ignore_eos": True, "max_new_tokens": num_tokens},
    }


def _completion_body(prompt: str, num_tokens: int, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _chat_body(prompt: str, num_tokens: int, model: str) -> dict[str, Any]:
    body = _completion_body("", num_tokens, model)
    del body["prompt"]
    return body | {"messages": [{"role": "user", "content": prompt}]}


class Api(NamedTuple):
    """One dialect: its route, its body for (prompt, number of tokens, model), the reader of its frames."""

    name: str
    path: str
    body: Callable[[str, int, str], dict[str, Any]]
    reader: type[StreamReader]


APIS: Mapping[str, Api] = MappingProxyType(
    {
        "lightllm": Api("lightllm", "/generate_stream", _native_body, NativeReader),
        "openai": Api("openai", "/v1/completions", _completion_body, OpenAIReader),
        "openai_chat": Api("openai_chat", "/v1/chat/completions", _chat_body, OpenAIReader),
    }
)


class Progress(Protocol):
    """Where a run tells how far it is."""

    def update(self, num_done: int, num_failed: int, num_tokens: int) -> None:
        """Requests ended, how many of them failed, and output tokens so far."""
        ...


class _NoProgress:
    def update(self, num_done: int, num_failed: int, num_tokens: int) -> None:
        return None


class LoadRun:
    """Sends jobs to one route and keeps `results`, in the order in which requests ended.

    Args:
        client: calls to the server.
        api: the dialect.
        path: the route; `api.path` unless the user gave another.
        model: name for bodies that carry one.
    """

    def __init__(self, client: HttpClient, api: Api, *, path: str, model: str) -> None:
        self.results: list[RequestResult] = []
        self.started_at = self.ended_at = 0.0
        self._client = client
        self._api = api
        self._path = path
        self._model = model
        self._progress: Progress = _NoProgress()
        self._num_tokens = 0
        self._num_failed = 0

    @property
    def duration_s(self) -> float:
        """From the first request sent to the last byte received."""
        return max(self.ended_at - self.started_at, 1e-9)

    async def warm_up(self, jobs: Sequence[Job]) -> RequestResult | None:
        """Send `jobs` at once, a few output tokens each; return a failure if there was one."""
        short = [replace(job, output_len=min(job.output_len, WARM_UP_OUTPUT_LEN)) for job in jobs]
        results = await asyncio.gather(*(self._send(job, lambda num: None) for job in short))
        return next((result for result in results if result.failure), None)

    async def run(
        self, jobs: Sequence[Job], *, num_clients: int, input_qps: float, seed: int, progress: Progress
    ) -> None:
        """Send all jobs: `num_clients` at a time, or with `input_qps` > 0 at random (Poisson) moments.

        `progress` is told of each frame with tokens and of each end.
        """
        self._progress = progress
        self.started_at = self.ended_at = time.perf_counter()
        if input_qps > 0:
            await self._open_loop(jobs, input_qps, seed)
        else:
            pending = iter(jobs)
            await asyncio.gather(*(self._client_loop(pending) for _ in range(min(num_clients, len(jobs)))))

    async def _client_loop(self, pending: Iterator[Job]) -> None:
        for job in pending:
            await self._record(job)

    async def _open_loop(self, jobs: Sequence[Job], input_qps: float, seed: int) -> None:
        rng = random.Random(f"arrival {seed}")
        due = self.started_at
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(self._record(job))
                due += rng.expovariate(input_qps)

    async def _record(self, job: Job) -> None:
        result = await self._send(job, self._count_tokens)
        self.ended_at = time.perf_counter()
        self.results.append(result)
        self._num_failed += result.failure is not None
        self._tell()

    def _count_tokens(self, num: int) -> None:
        self._num_tokens += num
        self._tell()

    def _tell(self) -> None:
        self._progress.update(len(self.results), self._num_failed, self._num_tokens)

    async def _send(self, job: Job, count_tokens: Callable[[int], None]) -> RequestResult:
        result = RequestResult(index=job.index, asked_tokens=job.output_len)
        reader = self._api.reader(count_tokens)
        body = self._api.body(job.prompt, job.output_len, self._model)
        start = time.perf_counter()
        try:
            response = await self._client.post(self._path, body, reader.feed)
            end = time.perf_counter()
            if response.status != 200:
                raise CallFailed("status", response.error_text())
            _check_whole(reader)
        except CallFailed as exc:
            # An error frame explains a cut that follows it.
            failed = reader.failed or exc
            result.failure, result.message = failed.failure, failed.message
            return result
        result.prompt_tokens, result.cached_tokens = reader.prompt_tokens, reader.cached_tokens
        result.output_tokens = reader.output_tokens
        result.request_s = end - start
        result.first_token_s = reader.stamps[0] - start
        result.gaps_s = [b - a for a, b in zip(reader.stamps, reader.stamps[1:], strict=False)]
        later = reader.output_tokens - reader.first_frame_tokens
        if later > 0 and len(reader.stamps) > 1:
            result.decode_token_s = (reader.stamps[-1] - reader.stamps[0]) / later
        return result


def _check_whole(reader: StreamReader) -> None:
    if reader.failed is not None:
        raise reader.failed
    if not reader.is_finished:
        raise CallFailed("cut", f"the stream ended after {reader.output_tokens} tokens without a last frame")
    if not reader.stamps or reader.output_tokens < 1:
        raise CallFailed("bad_answer", "the answer has no tokens")
