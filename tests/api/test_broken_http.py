"""Requests whose bytes lie or break off: whoever was promised an answer gets one, and only one."""

import asyncio
import json

import pytest

from tests.api.wire import BODY, Wire, code_of, post, run, wait_for

CHUNKED = post("/generate", b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
GET = b"GET /liveness HTTP/1.1\r\nhost: x\r\n"


def lying(length: int | str) -> bytes:
    return post("/generate").replace(b"content-length: %d" % len(BODY), f"content-length: {length}".encode())


async def expect(wire: Wire, status: int, code: str | None = None) -> dict[str, str]:
    got, headers, body = await asyncio.wait_for(wire.answer(), 5)
    assert got == status, body
    if code is not None:
        assert code_of(body) == code
    return headers


def test_a_content_length_that_is_too_short_leaves_no_one_unanswered() -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(lying(10))
        await expect(wire, 400, "bad_json")  # ten bytes of JSON are none
        headers = await expect(wire, 400, "bad_json")  # and what follows is no request
        assert headers["connection"] == "close"
        assert await wire.end() == b""

    run(test)


def test_a_content_length_that_is_too_long_ends_in_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.api.call.BODY_LIMIT_S", 0.1)
    monkeypatch.setattr("lightllm.api.protocol.DISCARD_LIMIT_S", 0.1)

    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(lying(len(BODY) + 1))
        await expect(wire, 408, "body_timeout")
        assert await wire.end() == b""
        assert context.engine.requests == []

    run(test)


@pytest.mark.parametrize("length", ["-1", "abc", "1, 2", "9" * 400, "0x10", ""])
def test_lengths_that_are_no_numbers(length: str) -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(lying(length))
        await expect(wire, 400, "bad_json")
        assert await wire.end() == b""

    run(test)


@pytest.mark.parametrize(
    "extra",
    ["content-length: 3\r\n", "transfer-encoding: chunked\r\n", "transfer-encoding: gzip, chunked\r\n"],
)
def test_two_lengths_at_once_are_refused(extra: str) -> None:
    """Where a proxy and a server disagree on the end of a request, one can hide in another."""

    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(post("/generate", extra=extra))
        await expect(wire, 400, "bad_json")
        assert await wire.end() == b""
        assert context.engine.requests == []

    run(test)


def test_broken_chunks_are_answered_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lightllm.request")

    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(CHUNKED + b'5\r\n{"inp\r\nZZ\r\n')
        headers = await expect(wire, 400, "bad_json")
        assert headers["connection"] == "close"
        assert await wire.end() == b""
        await wait_for(lambda: context.metrics.failures)
        assert dict(context.metrics.failures) == {("400", "bad_json"): 1}

    run(test)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lightllm.request"]
    assert "/generate status=400 code=bad_json" in line


def test_chunks_that_never_end_cost_30_s_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.api.call.BODY_LIMIT_S", 0.2)
    monkeypatch.setattr("lightllm.api.protocol.DISCARD_LIMIT_S", 0.1)

    async def test(context, connect) -> None:
        slow, other = await connect(), await connect()
        await slow.send(CHUNKED)
        await slow.send(b"1\r\n{\r\n")
        await other.send(post("/generate"))
        await expect(other, 200)
        await expect(slow, 408, "body_timeout")
        assert await slow.end() == b""

    run(test)


def test_garbage_behind_a_request_waits_for_its_answer() -> None:
    async def test(context, connect) -> None:
        context.engine.resumed.clear()
        wire = await connect()
        await wire.send(post("/generate") + post("/generate_stream"))
        await wait_for(lambda: context.engine.requests)
        await wire.send(b"\x16\x03\x01 nonsense\r\n\r\n" * 50)
        await asyncio.sleep(0.05)
        context.engine.resumed.set()
        await expect(wire, 200)
        status, _, body = await wire.answer()
        assert (status, body.count(b"data:")) == (200, 2)
        await expect(wire, 400, "bad_json")
        assert await wire.end() == b""

    run(test)


def test_a_body_that_breaks_after_its_answer_gets_no_second_one() -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(CHUNKED + b"7d0\r\n" + b" " * 2000 + b"\r\n")
        await expect(wire, 413, "too_large")
        await wire.send(b"ZZ\r\n")
        assert await wire.end() == b""

    run(test, server={"max_request_bytes": 1000})


@pytest.mark.parametrize("length", [b"content-length: %d" % len(BODY), b"transfer-encoding: chunked"])
def test_an_offered_upgrade_does_not_cost_the_body(length: bytes) -> None:
    """Java's client offers h2c with every request to http://; the answer in HTTP/1.1 declines it."""
    offer = (
        "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAAAAMAAAAA\r\n"
    )

    async def test(context, connect) -> None:
        wire = await connect()
        head = post("/generate", extra=offer).removesuffix(BODY)
        head = head.replace(b"content-length: %d" % len(BODY), length)
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) if length.startswith(b"transfer") else BODY
        for cut in (0, 20, len(body)):
            await wire.send(head + body[:cut])
            await asyncio.sleep(0.01)
            await wire.send(body[cut:])
            status, _, text = await wire.answer()
            assert (status, json.loads(text)["generated_text"]) == (200, ["he"])
        await wire.send(GET + b"connection: upgrade, close\r\nupgrade: h2c\r\n\r\n")
        await expect(wire, 200)
        assert await wire.end() == b""

    run(test)


@pytest.mark.parametrize("path", ["/pd_register", "/pd_master_register", "/pd_masters/watch"])
def test_node_links_are_not_here(path: str) -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        key = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
        head = f"GET {path} HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n{key}\r\n"
        await wire.send(head.encode())
        await expect(wire, 404, "not_found")

    run(test)


def test_a_tunnel_is_refused() -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(b"CONNECT example.org:443 HTTP/1.1\r\nhost: x\r\n\r\n")
        await expect(wire, 400, "bad_json")
        assert await wire.end() == b""

    run(test)


def test_head_has_the_headers_and_no_body() -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        for path, status in (
            ("/", 200),
            ("/metrics", 200),
            ("/v1/models", 200),
            ("/generate", 405),
            ("/x", 404),
        ):
            await wire.send(f"HEAD {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            head = (await wire.reader.readuntil(b"\r\n\r\n")).decode()
            assert head.startswith(f"HTTP/1.1 {status} ")
            assert "content-length: " in head
        await wire.send(GET + b"\r\n")  # a body of the answers before would stand in its way
        await expect(wire, 200)

    run(test)


def test_an_answer_that_is_hardly_read_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightllm.api.protocol.UNSENT_CHECK_S", 0.1)
    count = 20_000

    async def test(context, connect) -> None:
        wire = await connect()
        wire.writer.transport.pause_reading()
        body = {"inputs": "hi", "parameters": {"max_new_tokens": count, "return_details": True, "n": 2}}
        await wire.send(post("/generate", json.dumps(body).encode()))
        await wait_for(lambda: "does not read its answer" in caplog.text)
        other = await connect()
        await other.send(post("/generate"))
        await expect(other, 200)

    run(test, reply=[97] * count, max_len=200_000)


def test_beyond_the_open_files_clients_are_turned_away_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.api.protocol.resource.getrlimit", lambda which: (98, 98))
    monkeypatch.setattr("lightllm.api.protocol.MAX_TURNED_AWAY", 1)
    monkeypatch.setattr("lightllm.api.protocol.TURN_AWAY_S", 0.2)

    async def test(context, connect) -> None:
        first, second = await connect(), await connect()
        for wire in (first, second):
            await wire.send(post("/generate"))
            await expect(wire, 200)
        third, fourth = await connect(), await connect()
        headers = await expect(third, 429, "queue_full")
        assert headers["retry-after"] == "1"
        assert await fourth.end() == b""
        second.writer.close()
        assert await third.end() == b""
        await asyncio.sleep(0.3)
        fifth = await connect()
        await fifth.send(post("/generate"))
        await expect(fifth, 200)
        await first.send(post("/generate"))
        await expect(first, 200)

    run(test)
