"""The HTTP client: addresses, frames, keep-alive, and every way in which a call can fail."""

import asyncio
import socket

import pytest

from lightllm.bench.http_client import CallFailed, HttpClient, SSEParser, parse_url
from lightllm.errors import ConfigError
from tests.bench.fake_server import Cut, FakeServer, chunked, whole


def call(server: FakeServer, path: str, *, sink=None, timeout_s=5.0, times=1, api_key=None):
    async def run():
        client = HttpClient(parse_url(server.url), timeout_s=timeout_s, api_key=api_key)
        try:
            for _ in range(times):
                response = await client.post(path, {"a": 1}, sink)
            return response
        finally:
            client.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "origin", "path", "note"),
    [
        ("http://127.0.01:8000/generate_stream", "http://127.0.0.1:8000", "/generate_stream", True),
        ("http://127.1:8000", "http://127.0.0.1:8000", "", True),
        ("http://010.0.0.1/", "http://8.0.0.1:80", "", True),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", "", False),
        ("https://example.org/a/b?c=d", "https://example.org:443", "/a/b?c=d", False),
        ("http://[::1]:9/x", "http://[::1]:9", "/x", False),
    ],
)
def test_addresses_are_normalised(text, origin, path, note):
    url = parse_url(text)
    assert (url.origin, url.path, bool(url.note)) == (origin, path, note)


def test_the_note_names_both_forms():
    assert parse_url("http://127.0.01:8000").note == "address 127.0.01 means 127.0.0.1"


@pytest.mark.parametrize("text", ["ftp://h/x", "http://", "http://h:99999", "http://u:p@h/"])
def test_other_addresses_are_refused(text):
    with pytest.raises(ConfigError, match="--url"):
        parse_url(text)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_frames_are_cut_wherever_the_bytes_are(size):
    stream = b'data:{"a":1}\n\n: ping\n\ndata: {"b":\r\ndata: 2}\r\n\r\ndata:  x\n\ndata: unfinished\n'
    parser = SSEParser()
    events = [event for i in range(0, len(stream), size) for event in parser.feed(stream[i : i + size])]
    assert events == [b'{"a":1}', b'{"b":\n2}', b" x"]


def test_connections_and_headers_are_reused():
    with FakeServer({"/x": lambda request: whole({"ok": 1})}) as server:
        response = call(server, "/x", times=3, api_key="secret")
        assert response.status == 200
        assert server.num_connections == 1
        assert server.requests[0].headers["authorization"] == "Bearer secret"
        assert server.requests[0].headers["content-type"] == "application/json"


def test_a_connection_that_the_server_closed_while_idle_is_replaced():
    async def run(server):
        client = HttpClient(parse_url(server.url))
        await client.post("/x", {})
        server.drop_connections()
        await asyncio.sleep(0)  # the client has not yet read the end of the connection
        response = await client.post("/x", {})
        client.close()
        return response

    with FakeServer({"/x": lambda request: whole("{}")}) as server:
        assert asyncio.run(run(server)).status == 200
        assert server.num_connections == 2


def test_a_body_without_length_ends_with_the_connection():
    def answer(request):
        yield b"HTTP/1.1 200 OK\r\n\r\nab"
        yield b"c"
        raise Cut

    got = []
    with FakeServer({"/x": answer}) as server:
        assert call(server, "/x", sink=got.append).status == 200
    assert b"".join(got) == b"abc"


def test_a_refusal_is_an_answer_with_the_servers_words():
    answer = {"error": {"message": "top_p: got 2"}, "message": "top_p: got 2"}
    got = []
    with FakeServer({"/x": lambda request: whole(answer, 400)}) as server:
        response = call(server, "/x", sink=got.append)
    assert response.error_text() == "HTTP 400: top_p: got 2"
    assert got == []


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda request: chunked([b"data: 1\n\n"], is_cut=True), "cut"),
        (lambda request: iter([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"]), "timeout"),
        (lambda request: iter([b"garbage\r\n\r\n"]), "bad_answer"),
    ],
)
def test_failures_have_their_kind(answer, kind):
    with FakeServer({"/x": answer}) as server, pytest.raises(CallFailed) as caught:
        call(server, "/x", timeout_s=0.5, sink=lambda chunk: None)
    assert caught.value.failure == kind


def test_nobody_listens():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = parse_url(f"http://127.0.0.1:{probe.getsockname()[1]}")
        with pytest.raises(CallFailed, match=r"cannot connect to 127\.0\.0\.1:") as caught:
            asyncio.run(HttpClient(url).get("/"))
    assert caught.value.failure == "connect"
