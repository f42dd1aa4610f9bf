"""Clients that leave, hang or come in crowds, and processes that freeze: one server outlives them all.

Its log is JSON, and is read at the end: one line for each request, whatever became of it.
"""

import json
import os
import resource
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.e2e.conftest import Server, stream_events

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("e2e")]

LONG = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 3000, "ignore_eos": True}}


@pytest.fixture(scope="module")
def server(tiny_model: str) -> Iterator[Server]:
    server = Server("--model_dir", tiny_model, "--load_format", "dummy", "--log_format", "json")
    yield server
    assert server.stop() == 0
    events = [json.loads(line) for line in server.log]
    lines = Counter(e["message"].split()[0] for e in events if e["logger"] == "lightllm.request")
    assert lines
    assert set(lines.values()) == {1}
    assert [e for e in events if e["level"] == "error" or "exception" in e] == []


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server) -> Iterator[None]:
    """After each drill: no slot is lost, health tells the truth, the next request is right."""
    before = server.generate("Hello", max_new_tokens=5, ignore_eos=True)
    yield
    server.wait_until(lambda: not any(figures_of(server).values()))
    assert server.client.get("/health").status_code == 200
    assert server.generate("Hello", max_new_tokens=5, ignore_eos=True) == before


def figures_of(server: Server) -> dict[str, float]:
    """What is above 0 only while a request is there."""
    found = {name: server.metric(name) for name in ("requests_running", "requests_waiting", "kv_used_tokens")}
    return found | {"current_load": server.client.get("/token_load").json()["current_load"]}


def connect(server: Server, receive_bytes: int = 0) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    client = socket.socket()
    if receive_bytes:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(20)
    client.connect((host, int(port)))
    return client


def reset(client: socket.socket) -> None:
    """Close with RST instead of FIN."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def post(path: str, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


def test_clients_that_leave_after_the_headers_or_after_one_frame(server: Server) -> None:
    head, _, body = post("/generate_stream", LONG).partition(b"\r\n\r\n")
    for leave in (socket.socket.close, reset):
        client = connect(server)
        client.sendall(head + b"\r\n\r\n")
        leave(client)
        client = connect(server)
        client.sendall(head + b"\r\n\r\n" + body)
        while b"data:" not in client.recv(65536):
            pass
        assert server.metric("requests_running") == 1
        leave(client)
        server.wait_until(lambda: server.metric("requests_running") == 0, timeout_s=3)


def test_a_thousand_connects_and_resets(server: Server) -> None:
    request = post("/generate", LONG)
    for number in range(1000):
        client = connect(server)
        if number % 10 == 0:
            client.sendall(request)
        reset(client)
    # Accepted behind all of these: none of their requests can come later.
    assert httpx.get(server.url + "/liveness", timeout=30).status_code == 200


def test_a_client_that_reads_one_byte_a_second_is_cut_off(server: Server) -> None:
    body = {"prompt": "x", "n": 16, "logprobs": 20, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    client = connect(server, receive_bytes=4096)
    client.sendall(post("/v1/completions", body))
    try:
        end = time.monotonic() + 60
        while client.recv(1):
            assert time.monotonic() < end, "the server still sends to a client that does not read"
            if any("does not read its answer" in line for line in server.log):
                break
            time.sleep(1)
    except ConnectionError:
        pass
    finally:
        client.close()
    assert any("does not read its answer" in line for line in server.log)


def test_out_of_open_files_some_are_turned_away_and_nobody_is_harmed(server: Server) -> None:
    frontend = server.children()["frontend"]
    limits = resource.prlimit(frontend, resource.RLIMIT_NOFILE)
    held: list[socket.socket] = []
    try:
        with server.client.stream("POST", "/generate_stream", json=LONG) as reply:
            events = stream_events(reply)
            next(events)
            resource.prlimit(frontend, resource.RLIMIT_NOFILE, (256, limits[1]))
            held += [connect(server) for _ in range(159)]
            answers = []
            for _ in range(5):
                client = connect(server)
                client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                answers.append(client.makefile("rb").read())
                client.close()
            assert {answer.partition(b"\r\n")[0] for answer in answers} == {b"HTTP/1.1 429 Too Many Requests"}
            assert b"retry-after: 1\r\n" in answers[0]
            assert b"ulimit -n" in answers[0]
            held += [connect(server) for _ in range(200)]  # beyond what could be answered
            for _ in range(5):
                next(events)
    finally:
        for client in held:
            client.close()
        resource.prlimit(frontend, resource.RLIMIT_NOFILE, limits)


def test_a_frozen_frontend_answers_when_it_thaws(server: Server) -> None:
    frontend = server.children()["frontend"]
    body = {"inputs": "Once", "parameters": {"max_new_tokens": 200, "ignore_eos": True}}
    whole = server.generate("Once", max_new_tokens=200, ignore_eos=True)
    with server.client.stream("POST", "/generate_stream", json=body) as reply:
        events = stream_events(reply)
        texts = [next(events)["token"]["text"]]
        os.kill(frontend, signal.SIGSTOP)
        try:
            with pytest.raises(httpx.ReadTimeout):
                httpx.get(server.url + "/health", timeout=9.5)
        finally:
            os.kill(frontend, signal.SIGCONT)
        texts += [event["token"]["text"] for event in events]
    assert "".join(texts) == whole["generated_text"][0]
    assert server.children()["frontend"] == frontend


def test_running_requests_share_the_engine_evenly(server: Server) -> None:
    """Eight streams and a long prompt in their midst: nobody waits for anybody else to end."""
    num_tokens, counts = 500, [0] * 8
    request_ids: list[str] = []

    def run(index: int) -> None:
        body = {"inputs": f"Story {index}", "parameters": {"max_new_tokens": num_tokens, "ignore_eos": True}}
        with server.client.stream("POST", "/generate_stream", json=body) as reply:
            for _ in stream_events(reply):
                counts[index] += 1
        request_ids.append(reply.headers["x-request-id"])

    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(run, index) for index in range(8)]
        server.wait_until(lambda: min(counts) > 10)
        body = {"inputs": list(range(1000, 3000)), "parameters": {"max_new_tokens": 1}}
        assert server.client.post("/generate", json=body).status_code == 200
        assert max(counts) > 10
        for done in runs:
            done.result()
    assert counts == [num_tokens] * 8
    # By the server's clock: the threads of this test may read late.
    times = []
    for request_id in request_ids:
        shown = server.client.get(f"/debug/requests/{request_id}").json()
        events = dict(map(tuple, shown["nodes"][0]["events"]))
        times.append((events["first_token"], events["released"]))
    begins, ends = zip(*times, strict=True)
    # When the first one ends, each of the others has 80 % of its tokens: they come one a step to all. There
    # are so many of them that the tenth of a second by which a busy machine delays one does not count.
    assert max(ends) - min(ends) < 0.2 * (max(ends) - min(begins)), times


def test_a_deadline_in_mid_stream_is_an_error_frame(server: Server) -> None:
    with server.client.stream("POST", "/generate_stream", json={**LONG, "timeout_s": 1.0}) as reply:
        assert reply.status_code == 200
        last = list(stream_events(reply))[-1]
    assert (last["finish_reason"], last["error"]["code"]) == ("error", "deadline")
    chat = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "ignore_eos": True}
    # A connection of its own: the server closes the first one behind its error frame, maybe not yet.
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json={**chat, "timeout_s": 1.0}, timeout=60) as reply:
        text = reply.read().decode()
    assert "[DONE]" not in text
    assert json.loads(text.strip().rpartition("data: ")[2])["error"]["code"] == "deadline"


def test_an_operator_cancels_a_request(server: Server) -> None:
    with server.client.stream(
        "POST", "/generate_stream", json=LONG, headers={"x-request-id": "mine"}
    ) as reply:
        events = stream_events(reply)
        next(events)
        (live,) = httpx.get(server.url + "/debug/requests?state=live").json()["requests"]
        assert (live["label"], live["state"]) == ("mine", "decoding")
        assert httpx.delete(f"{server.url}/debug/requests/{live['id']}").status_code == 200
        last = list(events)[-1]
    assert (last["finish_reason"], last["finished"]) == ("abort", True)
    done = server.client.get(f"/debug/requests/{live['id']}").json()
    names = [name for name, _ in done["nodes"][0]["events"]]
    assert names == ["queued", "prefill_start", "first_token", "released"]


def test_steps_without_an_output_are_counted(server: Server) -> None:
    def steps() -> float:
        return server.metric("step_duration_count", 'phase="prefill"')

    server.generate("Hello", max_new_tokens=1)
    before = steps()
    server.generate(list(range(5000, 5400)), max_new_tokens=1)
    assert steps() - before == 4  # 400 tokens in chunks of 128


def test_a_hundred_clients_are_answered_exactly_once(server: Server) -> None:
    def ask(number: int) -> tuple[int, int]:
        body = {"inputs": f"{number}", "parameters": {"max_new_tokens": 4, "ignore_eos": True}}
        reply = server.client.post("/generate", json=body)
        return reply.status_code, reply.json()["count_output_tokens"]

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(ask, range(100))) == [(200, 4)] * 100


def test_legal_extremes_cost_nobody_else_anything(server: Server) -> None:
    """What once led to an id outside the vocabulary, and so to the end of the engine."""
    epoch = server.metric("engine_restarts_total")
    body = {"inputs": "Once", "parameters": {"max_new_tokens": 300, "ignore_eos": True}}
    with server.client.stream("POST", "/generate_stream", json=body) as reply:
        events = stream_events(reply)
        next(events)
        for fields in (
            {"allowed_token_ids": [2], "min_new_tokens": 3, "top_k": 5},
            {"allowed_token_ids": [5, 6], "exponential_decay_length_penalty": [0, 2.0]},
            {"repetition_penalty": 1e-300, "exponential_decay_length_penalty": [0, 1e308]},
            {"logit_bias": {str(i): -100 for i in range(1024)}, "temperature": 1e-5, "top_p": 0.5},
        ):
            server.generate("hi", do_sample=True, max_new_tokens=4, **fields)
        assert len(list(events)) == 299
    assert server.metric("engine_restarts_total") == epoch
