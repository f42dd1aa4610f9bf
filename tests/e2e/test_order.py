"""Who goes first when there is no room, seen from outside: a server that runs one request at a time."""

import threading
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Server, stream_events

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("e2e")]

LONG = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 3000, "ignore_eos": True}}
FLAGS = ("--running_max_req_size", "1", "--max_queued_requests", "2", "--schedule_policy", "shortest_prefill")


@pytest.fixture(scope="module")
def server(tiny_model: str) -> Iterator[Server]:
    server = Server("--model_dir", tiny_model, "--load_format", "dummy", *FLAGS, "--request_timeout", "50")
    yield server
    assert server.stop() == 0


class Queue:
    """Requests that wait behind one that runs; notes in which order they are answered."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.order: list[str] = []
        self.threads: list[threading.Thread] = []

    def add(self, name: str, inputs: object, **fields: object) -> None:
        waiting = self.server.metric("requests_waiting")

        def ask() -> None:
            body = {"inputs": inputs, "parameters": {"max_new_tokens": 2, "ignore_eos": True}, **fields}
            assert self.server.client.post("/generate", json=body).status_code == 200
            self.order.append(name)

        self.threads.append(threading.Thread(target=ask))
        self.threads[-1].start()
        self.server.wait_until(lambda: self.server.metric("requests_waiting") == waiting + 1)


def answered_order(server: Server, *requests: tuple[str, object, dict[str, object]]) -> list[str]:
    queue = Queue(server)
    with server.client.stream("POST", "/generate_stream", json=LONG) as reply:
        events = stream_events(reply)
        next(events)
        for name, inputs, fields in requests:
            queue.add(name, inputs, **fields)
    for thread in queue.threads:
        thread.join(timeout=30)
    return queue.order


def test_a_higher_priority_overtakes(server: Server) -> None:
    order = answered_order(server, ("plain", "aaa", {}), ("urgent", "bbb", {"priority": 10}))
    assert order == ["urgent", "plain"]


def test_waiting_is_worth_more_than_a_lower_priority_later(server: Server) -> None:
    order = answered_order(server, ("first", "aaa", {"priority": 3}), ("later", "bbb", {"priority": 2}))
    assert order == ["first", "later"]


def test_the_shortest_prompt_goes_first(server: Server) -> None:
    order = answered_order(server, ("long", list(range(2000, 4000)), {}), ("short", "bbb", {}))
    assert order == ["short", "long"]


def test_a_full_queue_answers_429_at_once(server: Server) -> None:
    queue = Queue(server)
    with server.client.stream("POST", "/generate_stream", json=LONG) as reply:
        events = stream_events(reply)
        next(events)
        queue.add("a", "a")
        queue.add("b", "b")
        for path in ("/generate", "/generate_stream"):
            began = time.monotonic()
            refused = server.client.post(path, json=LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert time.monotonic() - began < 2
    for thread in queue.threads:
        thread.join(timeout=30)
    assert sorted(queue.order) == ["a", "b"]


def test_a_request_that_waits_too_long_gets_504(server: Server) -> None:
    with server.client.stream("POST", "/generate_stream", json=LONG) as reply:
        events = stream_events(reply)
        next(events)
        for path in ("/generate", "/generate_stream"):
            began = time.monotonic()
            late = server.client.post(path, json={**LONG, "timeout_s": 0.5})
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline")
            assert time.monotonic() - began < 3
    too_long = server.client.post("/generate", json={**LONG, "timeout_s": 51})
    assert (too_long.status_code, too_long.json()["error"]["param"]) == (400, "timeout_s")
