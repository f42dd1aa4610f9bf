"""What benchmarks/pd_cluster.py measures, part by part; each fills a dictionary for the JSON.

A part talks to running servers through a `Bench` and starts nothing itself.
"""

import asyncio
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from open_loop import (
    LoopWatch,
    Record,
    Streams,
    ask,
    gaps_within,
    goodput,
    in_ms,
    open_loop,
    poisson_jobs,
    steady_jobs,
    summarise_step,
    token_ids,
)
from pd_servers import Server, Transfers

from lightllm.bench.http_client import HttpClient

WRONG_NATS = 0.1
LEAST_SHARE = 0.9
GIVE_UP_SHARE = 0.5
SEED = 20


@dataclass(frozen=True)
class Sizes:
    """How much of everything; lengths in tokens.

    Attributes:
        kv_tokens: KV of a node; 0: as it finds memory.
        texts, texts_longest, texts_tokens: number of prompts, the longest of them, output of each.
        ttft_lengths, ttft_count: prompts sent one by one.
        cached, burst: prompts of the longest of these lengths that are in the prefill node's cache; at once.
        link_shape, link_tokens, link_lane: for benchmarks/kv_transfer.py.
        streams, stream_prompt, stream_tokens: that decode; `stream_tokens` is more than the window sees.
        window_s: seconds that are looked at, without and with long prompts.
        long_prompt, long_rate: the disturbance, and how many a second.
        rates, step_s: of the open loop, a second, and how long each lasts.
        prompts, outputs: lengths in the open loop, from and to.
        ttft_limit_s, itl_limit_ms: what a request must keep.
        goodput_limit_s: no further rate is begun behind so many seconds.
    """

    kv_tokens: int = 0
    max_req_total_len: int = 16000
    texts: int = 24
    texts_longest: int = 2000
    texts_tokens: int = 12
    ttft_lengths: tuple[int, ...] = (512, 8000)
    ttft_count: int = 12
    cached: int = 6
    burst: int = 8
    link_shape: str = "qwen2-7b"
    link_tokens: int = 8192
    link_lane: str = "p2p"
    streams: int = 32
    stream_prompt: int = 256
    stream_tokens: int = 4000
    window_s: float = 8.0
    long_prompt: int = 8000
    long_rate: float = 2.0
    rates: tuple[float, ...] = (4.0, 6.0, 8.0, 10.0, 12.0)
    step_s: float = 12.0
    prompts: tuple[int, ...] = (2000, 6000)
    outputs: tuple[int, ...] = (100, 300)
    ttft_limit_s: float = 2.0
    itl_limit_ms: float = 25.0
    goodput_limit_s: float = 80.0


CPU_SIZES = Sizes(
    kv_tokens=20_000,
    max_req_total_len=3000,
    texts=12,
    texts_longest=300,
    texts_tokens=6,
    ttft_lengths=(32, 256),
    ttft_count=3,
    cached=2,
    burst=3,
    link_shape="smollm2-135m",
    link_tokens=512,
    link_lane="shm",
    streams=4,
    stream_prompt=16,
    stream_tokens=2000,
    window_s=1.5,
    long_prompt=256,
    long_rate=2.0,
    rates=(1.0, 3.0),
    step_s=2.0,
    prompts=(20, 100),
    outputs=(5, 15),
    itl_limit_ms=100.0,
    goodput_limit_s=15.0,
)


@dataclass
class Bench:
    """What parts need of a running cluster.

    Attributes:
        clients: where requests go, in turn; those of one node or entry alone go to the first.
        decode: the node that receives KV; None where none moves.
    """

    sizes: Sizes
    vocab_size: int
    clients: list[HttpClient]
    decode: Server | None
    say: Callable[[str], None]

    def prompts(self, what: str, count: int, length: int) -> list[list[int]]:
        """The same for the same words; no two share a beginning."""
        rng = random.Random(f"{SEED} {what} {length}")
        return [token_ids(rng, length, self.vocab_size) for _ in range(count)]


Entry = dict[str, Any]


# ------------------------------------------------------------ warm-up and texts


async def warm_up(bench: Bench, entry: Entry) -> None:
    """Have kernels compiled and graphs captured: prompts of all lengths, batches of all sizes."""
    await asyncio.gather(*(_warm(bench, f"warm {i}", client) for i, client in enumerate(bench.clients)))
    entry["nodes"] = len(bench.clients)


async def _warm(bench: Bench, what: str, client: HttpClient) -> None:
    sizes = bench.sizes
    for length in (*sizes.ttft_lengths, sizes.prompts[1]):
        for prompt in bench.prompts(what, 3, length):
            _check(await ask(client, prompt, 4))
    # A graph is captured when its size has come up twice; more streams than ITL has, since goodput has them.
    prompts = bench.prompts(f"{what} streams", 2 * sizes.streams, sizes.stream_prompt)
    staggered = [ask(client, prompt, 8 + 3 * i) for i, prompt in enumerate(prompts)]
    for record in await asyncio.gather(*staggered):
        _check(record)
    prompts = bench.prompts(f"{what} mixed", 4, sizes.prompts[1])
    for record in await asyncio.gather(*(ask(client, prompt, 8) for prompt in prompts)):
        _check(record)


def _check(record: Record) -> Record:
    if record.error:
        raise RuntimeError(f"a request of {record.prompt_tokens} tokens failed: {record.error}")
    return record


def text_prompts(bench: Bench) -> list[list[int]]:
    """Lengths from 1 to the longest, on a logarithmic scale; each third begins as the one before it."""
    sizes = bench.sizes
    rng = random.Random(f"{SEED} texts")
    found: list[list[int]] = []
    for i in range(sizes.texts):
        length = round(math.exp(math.log(sizes.texts_longest) * i / max(1, sizes.texts - 1)))
        shared = found[-1][: length * 3 // 4] if i % 3 == 2 else []
        found.append(shared + token_ids(rng, length - len(shared), bench.vocab_size))
    return found


async def texts(bench: Bench, entry: Entry) -> None:
    """Greedy answers, one by one."""
    records = [await ask(bench.clients[0], p, bench.sizes.texts_tokens) for p in text_prompts(bench)]
    entry |= {
        "prompt_tokens": [record.prompt_tokens for record in records],
        "errors": [record.error for record in records if record.error],
        "token_ids": [record.token_ids for record in records],
        "logprobs": [record.logprobs for record in records],
    }


async def compare_texts(bench: Bench, entry: Entry, pd: Entry, single: Entry) -> None:
    """Whether a cluster says what a single node says; called while the single node (`bench`) runs.

    Where the two differ, the single node tells how far the other's token is behind its own.
    """
    if "token_ids" not in pd or "token_ids" not in single:
        raise RuntimeError("there are no answers of both")
    differing, drifts, num_equal = [], [], 0
    for i, prompt in enumerate(text_prompts(bench)):
        ours, theirs = pd["token_ids"][i], single["token_ids"][i]
        pairs = zip(ours, theirs, strict=False)
        first = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        drifts += [abs(pd["logprobs"][i][k] - single["logprobs"][i][k]) for k in range(first)]
        if ours == theirs and len(ours) == bench.sizes.texts_tokens:
            num_equal += 1
            continue
        found: Entry = {"prompt_tokens": len(prompt), "position": first, "gap_nats": None}
        if first < min(len(ours), len(theirs)):
            scored = await _logprob_of(bench.clients[0], prompt + theirs[:first], ours[first])
            found["gap_nats"] = round(single["logprobs"][i][first] - scored, 5)
        differing.append(found)
    entry |= {"prompts": bench.sizes.texts, "equal": num_equal, "differing": differing}
    if drifts:
        entry["logprob_difference_p50"] = round(statistics.median(drifts), 6)
        entry["logprob_difference_max"] = round(max(drifts), 6)
    entry["other_prompts_logprob_difference_p50"] = await _sensitivity(bench, single)
    wrong = [one for one in differing if one["gap_nats"] is None or one["gap_nats"] > WRONG_NATS]
    if not differing:
        for answers in (pd, single):  # nobody needs them in the JSON
            answers.pop("token_ids")
            answers.pop("logprobs")
    if wrong:
        raise RuntimeError(f"{len(wrong)} answers differ, and not by a near-tie: {wrong[:3]}")


async def _logprob_of(client: HttpClient, before: list[int], token_id: int) -> float:
    """Of a token behind others, as this server scores it."""
    body = {"prompt": [*before, token_id], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    answer = await client.post_json("/v1/completions", {**body, "ignore_eos": True})
    return float(answer["choices"][0]["logprobs"]["token_logprobs"][len(before)])


async def _sensitivity(bench: Bench, single: Entry) -> float | None:
    """How far the first logprob moves if all tokens but the last are others: as it would with wrong KV."""
    rng = random.Random(f"{SEED} other")
    moved = []
    for i, prompt in list(enumerate(text_prompts(bench)))[-6:]:
        other = [*token_ids(rng, len(prompt) - 1, bench.vocab_size), prompt[-1]]
        record = await ask(bench.clients[0], other, 1)
        if not record.error and single["logprobs"][i]:
            moved.append(abs(record.logprobs[0] - single["logprobs"][i][0]))
    return round(statistics.median(moved), 6) if moved else None


# ------------------------------------------------------------ TTFT and transfers


async def ttft(bench: Bench, entry: Entry) -> None:
    """Prompts one by one: time to the first token, from it to the second, and to the third."""
    for length in bench.sizes.ttft_lengths:
        moved = await Transfers.begin(bench.decode) if bench.decode is not None else None
        prompts = bench.prompts("ttft", bench.sizes.ttft_count, length)
        records = [await ask(bench.clients[0], prompt, 8) for prompt in prompts]
        whole = [record for record in records if not record.error]
        found: Entry = {
            "requests": len(records),
            "errors": [record.error for record in records if record.error],
            "p50_ms": in_ms([record.ttft_s for record in whole], 50),
            "min_ms": in_ms([record.ttft_s for record in whole], 0),
            "max_ms": in_ms([record.ttft_s for record in whole], 100),
            "second_token_p50_ms": in_ms([record.gaps_s[0] for record in whole], 50),
            "third_token_p50_ms": in_ms([record.gaps_s[1] for record in whole], 50),
        }
        if moved is not None:
            found["transfers"] = await moved.end()
        entry[str(length)] = found


async def transfer(bench: Bench, entry: Entry, link_lane: str) -> None:
    """Long prompts that the prefill node has cached, so that only their KV is waited for; then a burst."""
    assert bench.decode is not None
    length, client = max(bench.sizes.ttft_lengths), bench.clients[0]
    prompts = bench.prompts("cached", bench.sizes.cached, length)
    for prompt in prompts:
        _check(await ask(client, prompt, 1))  # needs no decode node, so its KV stays where it is
    moved = await Transfers.begin(bench.decode)
    records = [await ask(client, prompt, 4) for prompt in prompts]
    entry["cached"] = {**await moved.end(), **_second_tokens(records)}
    moved = await Transfers.begin(bench.decode)
    began_s = time.perf_counter()
    prompts = bench.prompts("burst", bench.sizes.burst, length)
    records = list(await asyncio.gather(*(ask(client, prompt, 8) for prompt in prompts)))
    wall_s = time.perf_counter() - began_s
    entry["burst"] = {"wall_s": round(wall_s, 3), **await moved.end(), **_second_tokens(records)}
    lanes = {*entry["cached"]["lanes"], *entry["burst"]["lanes"]}
    if lanes != {link_lane}:
        raise RuntimeError(f"KV went by {', '.join(sorted(lanes)) or 'nothing'}, not by {link_lane}")


def _second_tokens(records: list[Record]) -> Entry:
    whole = [record for record in records if not record.error]
    return {
        "errors": [record.error for record in records if record.error],
        "ttft_p50_ms": in_ms([record.ttft_s for record in whole], 50),
        "second_token_p50_ms": in_ms([record.gaps_s[0] for record in whole], 50),
    }


# ------------------------------------------------------------ decode under long prompts


async def itl(bench: Bench, entry: Entry, long_outputs: tuple[int, ...]) -> None:
    """Gaps of streams that decode: alone, then while long prompts arrive, with new streams each time.

    Args:
        long_outputs: output tokens of the long prompts, one window for each; with 1 no KV moves.
    """
    entry["idle"] = await _window(bench, "idle", None)
    for num_tokens in long_outputs:
        found = await _window(bench, f"long {num_tokens}", num_tokens)
        idle, loaded = entry["idle"]["p99_ms"], found["p99_ms"]
        found["p99_ratio"] = round(loaded / idle, 3) if idle and loaded else None
        entry[f"long_{num_tokens}"] = found


async def _window(bench: Bench, what: str, long_output: int | None) -> Entry:
    sizes, client = bench.sizes, bench.clients[0]
    prompts = bench.prompts(f"streams {what}", sizes.streams, sizes.stream_prompt)
    count = int(sizes.long_rate * sizes.window_s) + 1
    long_prompts = bench.prompts(f"long {what}", count, sizes.long_prompt)
    streams = Streams(client, prompts, sizes.stream_tokens)
    records: list[Record] = []
    try:
        await streams.wait_all_decode(16, 30.0)
        await asyncio.sleep(0.3)
        watch, began_s = LoopWatch(), time.perf_counter()
        if long_output is not None:
            jobs = steady_jobs(sizes.long_rate, sizes.window_s, long_prompts, long_output)
            records = await open_loop([client], jobs, sizes.window_s + 5.0)
        await asyncio.sleep(max(0.0, began_s + sizes.window_s - time.perf_counter()))
        await watch.stop()
        streams.check()
    finally:
        await streams.stop()
    await asyncio.sleep(0.5)  # the servers forget them
    gaps = gaps_within(streams.records, began_s, began_s + sizes.window_s)
    whole = [record for record in records if not record.error]
    return {
        "gaps": len(gaps),
        "p50_ms": in_ms(gaps, 50),
        "p99_ms": in_ms(gaps, 99),
        "p999_ms": in_ms(gaps, 99.9),
        "max_ms": in_ms(gaps, 100),
        "tokens_per_s": round(len(gaps) / sizes.window_s, 1),
        "client_late_p99_ms": in_ms(watch.late_s, 99),
        "client_late_max_ms": in_ms(watch.late_s, 100),
        "long_prompts": len(records),
        "long_errors": [record.error for record in records if record.error],
        "long_ttft_p50_ms": in_ms([record.ttft_s for record in whole], 50),
    }


# ------------------------------------------------------------ goodput


async def measure_goodput(bench: Bench, entry: Entry) -> None:
    """Poisson arrivals at rising rates, until half of the requests are late or the time is over."""
    sizes = bench.sizes
    itl_s = sizes.itl_limit_ms / 1e3
    # A request that takes longer than this has broken a limit.
    limit_s = sizes.ttft_limit_s + sizes.outputs[1] * itl_s
    steps: list[dict[str, object]] = entry.setdefault("steps", [])
    began_s = time.perf_counter()
    for rate in sizes.rates:
        if time.perf_counter() - began_s + sizes.step_s > sizes.goodput_limit_s:
            entry["left_out"] = f"rates from {rate:g}: no time left"
            break
        jobs = poisson_jobs(rate, sizes.step_s, sizes.prompts[:2], sizes.outputs[:2], bench.vocab_size, SEED)
        if not jobs:
            continue  # so low a rate that nothing came
        records = await open_loop(bench.clients, jobs, limit_s)
        step = summarise_step(rate, records, sizes.ttft_limit_s, itl_s)
        steps.append(step)
        errors = f", errors: {step['errors']}" if step["errors"] else ""
        bench.say(f"  {rate:g} requests/s: {step['share']:.0%} of {step['requests']} in time{errors}")
        entry["goodput"] = goodput(steps, LEAST_SHARE)
        entry["goodput_gap_p99"] = goodput(steps, LEAST_SHARE, "share_gap_p99")
        if float(str(step["share"])) < GIVE_UP_SHARE:
            entry["left_out"] = f"rates above {rate:g}: less than half in time"
            break
        await asyncio.sleep(0.5)
