"""Streams of token ids sent by one asyncio process, and what is counted of them: gaps, attainment, goodput.

Knows servers by `/generate_stream` only. Times are seconds of `time.perf_counter`, taken inside the read
event that brought the bytes.
"""

import asyncio
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightllm.bench.http_client import CallFailed, HttpClient, SSEParser
from lightllm.bench.report import percentile

NAME = re.compile(r"\S*[0-9a-f]{8}\S*")
FIRST_TOKEN_ID = 10
"""Lower ids are left to special tokens."""
WATCH_S = 0.002


class _Token(msgspec.Struct):
    id: int | None = None
    logprob: float | None = None


class _Error(msgspec.Struct):
    message: str = "no message"
    code: str = ""


class _Frame(msgspec.Struct):
    token: _Token = msgspec.field(default_factory=_Token)
    finished: bool = False
    error: _Error | None = None


_FRAME = msgspec.json.Decoder(_Frame)


@dataclass
class Record:
    """One request.

    Attributes:
        stamps: arrival of each token.
        late_s: how much later it was sent than it should have been; more than a few ms: the client is slow.
        error: why it is not whole; empty where it is.
    """

    asked: int
    prompt_tokens: int
    sent_s: float = 0.0
    late_s: float = 0.0
    stamps: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_whole: bool = False
    error: str = "not finished"

    @property
    def ttft_s(self) -> float:
        """From the request to the first token; infinite without one."""
        return self.stamps[0] - self.sent_s if self.stamps else float("inf")

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next."""
        return [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]

    @property
    def itl_s(self) -> float:
        """Mean gap; 0 for one token."""
        spans = len(self.stamps) - 1
        return (self.stamps[-1] - self.stamps[0]) / spans if spans > 0 else 0.0

    def take(self, data: bytes, now: float) -> None:
        """One frame of the stream."""
        frame = _FRAME.decode(data)
        if frame.error is not None:
            self.error = f"{frame.error.code}: {frame.error.message}"[:300]
            return
        self.stamps.append(now)
        self.token_ids.append(-1 if frame.token.id is None else frame.token.id)
        self.logprobs.append(0.0 if frame.token.logprob is None else frame.token.logprob)
        self.is_whole = frame.finished


class Job(msgspec.Struct):
    """One request to come, `due_s` behind the start."""

    due_s: float
    prompt: list[int]
    num_tokens: int


async def ask(client: HttpClient, prompt: list[int], num_tokens: int, record: Record | None = None) -> Record:
    """Send one greedy request and read its answer; a failure is in the record.

    Args:
        record: to be filled, for a caller that looks at it meanwhile, or cancels.
    """
    record = record or Record(num_tokens, len(prompt))
    events = SSEParser()

    def feed(chunk: bytes) -> None:
        now = time.perf_counter()
        for data in events.feed(chunk):
            record.take(data, now)

    parameters = {"max_new_tokens": num_tokens, "do_sample": False, "ignore_eos": True}
    record.sent_s = time.perf_counter()
    try:
        reply = await client.post("/generate_stream", {"inputs": prompt, "parameters": parameters}, feed)
    except CallFailed as error:
        record.error = record.error if record.error != "not finished" else f"{error.failure}: {error.message}"
        return record
    if reply.status != 200:
        record.error = reply.error_text()
    elif record.is_whole and len(record.stamps) == num_tokens:
        record.error = ""
    elif record.error == "not finished":
        record.error = f"cut off after {len(record.stamps)} of {num_tokens} tokens"
    return record


def token_ids(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    """A prompt."""
    return [rng.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(count)]


# ------------------------------------------------------------ open loop


def poisson_jobs(
    rate: float,
    seconds: float,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    vocab_size: int,
    seed: int,
) -> list[Job]:
    """Requests at random moments, `rate` a second in the mean; the same for the same arguments."""
    rng = random.Random(f"{seed} {rate}")
    jobs, due_s = [], rng.expovariate(rate)
    while due_s < seconds:
        prompt = token_ids(rng, rng.randint(*prompt_tokens), vocab_size)
        jobs.append(Job(due_s, prompt, rng.randint(*output_tokens)))
        due_s += rng.expovariate(rate)
    return jobs


def steady_jobs(rate: float, seconds: float, prompts: list[list[int]], num_tokens: int) -> list[Job]:
    """Requests at equal distances; there are as many prompts as needed."""
    return [Job(i / rate, prompts[i], num_tokens) for i in range(int(rate * seconds))]


async def open_loop(clients: Sequence[HttpClient], jobs: list[Job], limit_s: float) -> list[Record]:
    """Send each job when it is due, whatever became of those before it, to the clients in turn.

    Args:
        limit_s: a request that takes longer is cancelled and counts as failed.
    """
    records, tasks = [], []
    began_s = time.perf_counter()
    for i, job in enumerate(jobs):
        await asyncio.sleep(max(0.0, began_s + job.due_s - time.perf_counter()))
        record = Record(job.num_tokens, len(job.prompt))
        record.late_s = time.perf_counter() - began_s - job.due_s
        records.append(record)
        tasks.append(asyncio.create_task(_limited(clients[i % len(clients)], job, record, limit_s)))
    await asyncio.gather(*tasks)
    return records


async def _limited(client: HttpClient, job: Job, record: Record, limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await ask(client, job.prompt, job.num_tokens, record)
    except TimeoutError:
        record.error = f"not finished within {limit_s:g} s"


# ------------------------------------------------------------ streams that go on


class Streams:
    """Streams that decode at the same time until they are stopped."""

    def __init__(self, client: HttpClient, prompts: list[list[int]], num_tokens: int) -> None:
        self.records = [Record(num_tokens, len(prompt)) for prompt in prompts]
        self._tasks = [
            asyncio.create_task(ask(client, prompt, num_tokens, record))
            for prompt, record in zip(prompts, self.records, strict=True)
        ]

    async def wait_all_decode(self, num_tokens: int, limit_s: float) -> None:
        """Until each has so many tokens.

        Raises:
            RuntimeError: one has ended, or the time is over.
        """
        until_s = time.perf_counter() + limit_s
        while any(len(record.stamps) < num_tokens for record in self.records):
            self.check()
            if time.perf_counter() > until_s:
                counts = sorted(len(record.stamps) for record in self.records)
                raise RuntimeError(f"streams have {counts[0]}..{counts[-1]} tokens after {limit_s:g} s")
            await asyncio.sleep(0.02)

    def check(self) -> None:
        """All still run.

        Raises:
            RuntimeError: one has ended.
        """
        ended = [record for record, task in zip(self.records, self._tasks, strict=True) if task.done()]
        if ended:
            raise RuntimeError(f"{len(ended)} streams have ended, the first: {ended[0].error or 'whole'}")

    async def stop(self) -> None:
        """Break the connections, which aborts the requests."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class LoopWatch:
    """How late this process's own loop is while others are timed: what it adds to their gaps.

    Attributes:
        late_s: of each tick, every few milliseconds.
    """

    def __init__(self) -> None:
        self.late_s: list[float] = []
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            due_s = time.perf_counter() + WATCH_S
            await asyncio.sleep(WATCH_S)
            self.late_s.append(time.perf_counter() - due_s)

    async def stop(self) -> None:
        """No more ticks."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


# ------------------------------------------------------------ figures


def gaps_within(records: list[Record], begin_s: float, end_s: float) -> list[float]:
    """Gaps of all streams that end in that window, seconds."""
    return [
        b - a
        for record in records
        for a, b in zip(record.stamps, record.stamps[1:], strict=False)
        if begin_s <= b < end_s
    ]


def in_ms(values_s: Sequence[float], share: float) -> float | None:
    """A percentile in milliseconds; None of nothing."""
    return round(percentile(values_s, share) * 1e3, 3) if values_s else None


def keeps(record: Record, ttft_s: float, itl_s: float, *, share: float | None = None) -> bool:
    """Whether a request came whole and in time.

    Args:
        share: percentile of its gaps that is held against `itl_s`; None: their mean.
    """
    gaps = record.gaps_s
    itl = record.itl_s if share is None or not gaps else percentile(gaps, share)
    return not record.error and record.ttft_s <= ttft_s and itl <= itl_s


def summarise_step(rate: float, records: list[Record], ttft_s: float, itl_s: float) -> dict[str, object]:
    """One rate of the open loop: shares of requests within the limits, and the times behind them."""
    whole = [record for record in records if not record.error]
    errors: dict[str, int] = {}
    for record in records:
        if record.error:
            kind = NAME.sub("...", record.error)[:160]  # names of requests would make each its own kind
            errors[kind] = errors.get(kind, 0) + 1
    count = max(1, len(records))
    return {
        "rate": rate,
        "requests": len(records),
        "share": round(sum(keeps(r, ttft_s, itl_s) for r in records) / count, 4),
        "share_gap_p99": round(sum(keeps(r, ttft_s, itl_s, share=99) for r in records) / count, 4),
        "share_ttft": round(sum(not r.error and r.ttft_s <= ttft_s for r in records) / count, 4),
        "ttft_p50_ms": in_ms([r.ttft_s for r in whole], 50),
        "ttft_p90_ms": in_ms([r.ttft_s for r in whole], 90),
        "itl_p50_ms": in_ms([r.itl_s for r in whole], 50),
        "itl_p90_ms": in_ms([r.itl_s for r in whole], 90),
        "client_late_max_ms": in_ms([r.late_s for r in records], 100),
        "errors": errors,
    }


def goodput(steps: Sequence[dict[str, object]], least: float, key: str = "share") -> float:
    """The highest rate at which at least that share of the requests was in time; 0 where none was."""
    good = [step["rate"] for step in steps if isinstance(step.get(key), float) and step[key] >= least]
    return max(good, default=0.0)
