"""Ranks as real processes: the same answers as one rank, and no request that hangs when a rank is lost."""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import Server, stream_events

LONG = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 3000, "ignore_eos": True}}
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("e2e")]


def ranks_of(server: Server) -> list[int]:
    """Pids of the worker processes, in the order of ranks."""
    engine = server.children()["engine"]
    children = Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
    return [int(pid) for pid in children if b"lightllm.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_there(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def two_ranks(tiny_model: str) -> Iterator[Server]:
    server = Server("--model_dir", tiny_model, "--load_format", "dummy", "--tp", "2")
    yield server
    server.stop()


def test_two_ranks_answer_as_one_and_come_back_when_one_is_killed(start, two_ranks: Server) -> None:
    fields = {"max_new_tokens": 20, "ignore_eos": True}
    alone: Server = start()
    expected = [alone.generate(text, **fields) for text in ("Hello", "A longer text than that")]
    alone.stop()
    server = two_ranks
    assert [server.generate(text, **fields) for text in ("Hello", "A longer text than that")] == expected
    scored = server.client.post(
        "/v1/completions",
        json={
            "prompt": "Hello there",
            "max_tokens": 2,
            "temperature": 0.7,
            "seed": 3,
            "logprobs": 1,
            "echo": True,
        },
    ).json()
    assert len(scored["choices"][0]["logprobs"]["token_logprobs"]) > 3
    # The engine's own process has no torch; its ranks do.
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (server.children()["engine"], *ranks_of(server))]
    assert ["libtorch" in text for text in maps] == [False, True, True]

    workers, engine = (
        server.metric("resident_memory_bytes", f'process="{name}"') for name in ("worker", "engine")
    )
    assert workers > 2 * engine > 0

    ranks = ranks_of(server)
    with ThreadPoolExecutor(2) as pool, server.client.stream("POST", "/generate_stream", json=LONG) as reply:
        events = stream_events(reply)
        next(events)
        other = pool.submit(server.client.post, "/generate", json=LONG)
        server.wait_until(lambda: server.metric("requests_running") == 2)
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        last = list(events)[-1]
        answer = other.result(timeout=10)
    assert time.monotonic() - killed < 4
    named = rf"rank 1 on {re.escape(socket.gethostname())} \(process {ranks[1]}\) was killed by SIGKILL"
    assert re.search(named, last["error"]["message"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_down")
    assert re.search(named, server.client.get("/health").json()["message"])
    server.wait_until(lambda: server.client.get("/readiness").status_code == 200, timeout_s=30)
    assert not [pid for pid in ranks if is_there(pid)]
    assert server.generate("Hello", **fields) == expected[0]
    assert server.metric("kv_used_tokens") == 0


def test_a_frozen_rank_ends_its_requests_within_ten_seconds(start) -> None:
    server: Server = start("--tp", "2", "--restart_policy", "never")
    ranks = ranks_of(server)
    with server.client.stream("POST", "/generate_stream", json=LONG) as reply:
        events = stream_events(reply)
        next(events)
        os.kill(ranks[0], signal.SIGSTOP)
        frozen = time.monotonic()
        last = list(events)[-1]
    assert time.monotonic() - frozen < 10
    assert last["error"]["code"] == "engine_down"
    assert re.search(
        r"rank 0 on \S+ \(process \d+\) has not been heard of for \d s", last["error"]["message"]
    )
    assert server.process.wait(timeout=10) == 1
    assert not [pid for pid in ranks if is_there(pid)]


def test_ranks_do_not_outlive_a_killed_engine_even_frozen(two_ranks: Server) -> None:
    """The last test of this server; that it answers again is another's business."""
    server = two_ranks
    ranks = ranks_of(server)
    os.kill(ranks[1], signal.SIGSTOP)
    os.kill(server.children()["engine"], signal.SIGKILL)
    end = time.monotonic() + 5
    while any(map(is_there, ranks)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in ranks if is_there(pid)]
