"""Fault drills with real processes: nothing hangs, nothing is lost silently, health tells the truth."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.e2e.conftest import Server, stream_events

LONG = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 3000, "ignore_eos": True}}
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("e2e")]


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def lasting(tiny_model: str) -> Iterator[Server]:
    """A server that outlives its engine and its frontend; two requests run at a time."""
    server = Server("--model_dir", tiny_model, "--load_format", "dummy", "--running_max_req_size", "2")
    yield server
    server.stop()


def test_a_killed_engine_fails_its_requests_at_once_and_comes_back(lasting: Server) -> None:
    server, num_restarts = lasting, lasting.metric("engine_restarts_total")
    right = server.generate("Hello", max_new_tokens=3, ignore_eos=True)
    engine = server.children()["engine"]
    with ThreadPoolExecutor(4) as pool, server.client.stream("POST", "/generate_stream", json=LONG) as reply:
        events = stream_events(reply)
        next(events)
        # One more runs and three wait.
        others = [pool.submit(server.client.post, "/generate", json=LONG) for _ in range(4)]
        server.wait_until(lambda: server.metric("requests_waiting") == 3)
        os.kill(engine, signal.SIGKILL)
        killed = time.monotonic()
        last = list(events)[-1]
        answers = [other.result(timeout=10) for other in others]
    assert time.monotonic() - killed < 2
    assert (last["finish_reason"], last["finished"]) == ("error", True)
    assert last["error"]["code"] == "engine_down"
    assert "SIGKILL" in last["message"]
    assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [(503, "engine_down")] * 4
    # A connection of its own: the one of the stream closes behind its error frame.
    with httpx.Client(base_url=server.client.base_url) as client:
        assert client.get("/health").status_code == 503
        reply = client.post("/generate", json=LONG)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "engine_down"
    assert int(reply.headers["retry-after"]) >= 1
    server.wait_until(lambda: server.client.get("/readiness").status_code == 200)
    assert server.children()["engine"] != engine
    assert server.client.get("/health").status_code == 200
    assert server.generate("Hello", max_new_tokens=3, ignore_eos=True) == right
    assert server.metric("engine_restarts_total") == num_restarts + 1
    assert server.metric("kv_used_tokens") == 0


def test_a_killed_frontend_comes_back_on_the_same_port_and_leaves_no_orphans(lasting: Server) -> None:
    server = lasting
    with server.client.stream("POST", "/generate_stream", json=LONG) as reply:
        events = stream_events(reply)
        next(events)
        os.kill(server.children()["frontend"], signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            list(events)
    server.wait_until(lambda: server.client.get("/readiness").status_code == 200)
    assert server.generate("Hello", max_new_tokens=3)["count_output_tokens"] == 3
    server.wait_until(lambda: server.metric("requests_running") == 0)
    assert server.metric("kv_used_tokens") == 0


def test_a_frozen_engine_turns_health_red_and_loses_nothing(lasting: Server) -> None:
    server, num_restarts = lasting, lasting.metric("engine_restarts_total")
    engine = server.children()["engine"]
    fields = {"max_new_tokens": 300, "ignore_eos": True}
    whole = server.generate("Once", **fields)["generated_text"][0]
    with server.client.stream(
        "POST", "/generate_stream", json={"inputs": "Once", "parameters": fields}
    ) as reply:
        events = stream_events(reply)
        texts = [next(events)["token"]["text"]]
        os.kill(engine, signal.SIGSTOP)
        frozen = time.monotonic()
        try:
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(server.generate, "Hello", max_new_tokens=5, ignore_eos=True)
                server.wait_until(lambda: server.client.get("/health").status_code == 503)
                assert 5 < time.monotonic() - frozen < 9
                assert re.fullmatch(
                    r"engine: no answer for \d+ s", server.client.get("/health").json()["message"]
                )
                assert server.client.get("/liveness").status_code == 200
                time.sleep(max(0.0, 10 - (time.monotonic() - frozen)))
                os.kill(engine, signal.SIGCONT)
                assert waiting.result(timeout=20)["count_output_tokens"] == 5
        finally:
            os.kill(engine, signal.SIGCONT)
        texts += [event["token"]["text"] for event in events]
    assert "".join(texts) == whole
    assert server.client.get("/health").status_code == 200
    assert server.metric("kv_used_tokens") == 0
    assert server.metric("engine_restarts_total") == num_restarts


def test_children_do_not_outlive_a_killed_supervisor(lasting: Server) -> None:
    """The last test of this server."""
    server = lasting
    children = server.children()
    assert set(children) == {"engine", "frontend"}
    server.process.kill()
    server.process.wait()
    end = time.monotonic() + 10
    while any(exists(pid) for pid in children.values()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [name for name, pid in children.items() if exists(pid)]


def test_restart_policy_never_ends_the_node(start) -> None:
    server: Server = start("--restart_policy", "never")
    os.kill(server.children()["engine"], signal.SIGKILL)
    assert server.process.wait(timeout=10) == 1


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(start) -> None:
    server: Server = start()
    body = {"inputs": "Once", "parameters": {"max_new_tokens": 1000, "ignore_eos": True}}
    with server.client.stream("POST", "/generate_stream", json=body) as reply:
        events = stream_events(reply)
        next(events)
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: server.client.get("/readiness").status_code == 503)
        refused = server.client.post("/generate", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        last = list(events)[-1]
    assert last["finish_reason"] == "length"
    assert last["token"]["count_output_tokens"] == 1000
    assert server.process.wait(timeout=10) == 0


@contextlib.contextmanager
def draining(server: Server) -> Iterator[Iterator[dict[str, object]]]:
    """A long stream's further events, once the server has been told to stop and takes nothing new."""
    with server.client.stream("POST", "/generate_stream", json=LONG) as reply:
        events = stream_events(reply)
        next(events)
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: server.client.get("/readiness").status_code == 503)
        yield events


def test_a_second_signal_stops_now(start) -> None:
    server: Server = start()
    with draining(server) as events:
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        try:
            list(events)
        except httpx.TransportError:
            pass  # the promise to let it finish was withdrawn
    assert server.process.wait(timeout=10) == 1
    assert time.monotonic() - began < 5


def test_drain_timeout_ends_what_does_not_finish(start) -> None:
    server: Server = start("--drain_timeout", "1")
    with server.client.stream("POST", "/generate_stream", json=LONG) as reply:
        events = stream_events(reply)
        next(events)
        server.process.send_signal(signal.SIGTERM)
        last = list(events)[-1]
    assert last["finish_reason"] == "error"
    assert last["error"]["code"] == "draining"
    assert server.process.wait(timeout=10) == 0


def test_an_engine_that_dies_while_the_node_drains_ends_its_requests_at_once(start) -> None:
    server: Server = start()
    with draining(server) as events:
        killed = time.monotonic()
        os.kill(server.children()["engine"], signal.SIGKILL)
        last = list(events)[-1]
    assert time.monotonic() - killed < 2
    assert last["error"]["code"] == "engine_down"
    assert server.process.wait(timeout=10) == 0


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model_dir", "/no/such/folder"], 3, "/no/such/folder"),
        (["--no_such_flag"], 2, "--no_such_flag"),
        (["--host", "203.0.113.7"], 4, "203.0.113.7"),
        (["--max_total_token_num", "900000000"], 3, "--max_total_token_num"),
    ],
)
def test_start_up_errors_are_one_readable_block_with_their_exit_code(flags, code, words) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightllm.server.api_server", "--port", "0", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    last_block = done.stderr.splitlines()[-1]
    assert last_block.startswith("error: ")
    assert words in last_block
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
