"""A real server on loopback: exact bytes, broken HTTP, clients that leave, do not read, or are slow."""

import json
import socket

import pytest

from lightllm.messages import RequestOutput
from tests.api.wire import code_of, post, run, wait_for


def test_frames_are_chunks_and_the_connection_lives_on() -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        for _ in range(2):
            await wire.send(post("/generate_stream"))
            head = await wire.reader.readuntil(b"\r\n\r\n")
            assert b"transfer-encoding: chunked" in head
            assert b"server: lightllm/0.0.0" in head
            raw = await wire.reader.readuntil(b"0\r\n\r\n")
            for frame in raw.removesuffix(b"0\r\n\r\n").split(b"\n\n\r\n")[:-1]:
                size, _, data = frame.partition(b"\r\n")
                assert int(size, 16) == len(data) + 2
                assert data.startswith(b'data:{"token":{"id":')
            await wire.send(post("/generate"))
            assert json.loads((await wire.answer())[2])["generated_text"] == ["he"]

    run(test)


def test_the_first_frame_of_a_turn_leaves_at_once_and_the_others_in_one_chunk() -> None:
    async def test(context, connect) -> None:
        submitted = []
        context.engine.submit = lambda request, sink: submitted.append((request, sink))
        wire = await connect()
        await wire.send(post("/generate_stream", b'{"inputs":"hi","parameters":{"max_new_tokens":7}}'))
        await wait_for(lambda: submitted)
        request, sink = submitted[0]

        def put(text: bytes, reason: str | None = None) -> None:
            for byte in text:
                is_last = byte == text[-1]
                sink.on_output(
                    RequestOutput(
                        request_id=request.request_id,
                        new_token_ids=[byte],
                        finish_reason=reason if is_last else None,
                    )
                )

        async def chunk() -> list[str]:
            size = int(await wire.reader.readline(), 16)
            frames = (await wire.reader.readexactly(size + 2)).removesuffix(b"\n\n\r\n").split(b"\n\n")
            return [json.loads(frame.removeprefix(b"data:"))["token"]["text"] for frame in frames]

        put(b"ab")  # before the status line: both wait for it
        await wire.reader.readuntil(b"\r\n\r\n")
        chunks = [await chunk()]
        for text, reason, count in ((b"c", None, 1), (b"defg", "length", 2)):
            put(text, reason)
            chunks += [await chunk() for _ in range(count)]
        assert chunks == [["a", "b"], ["c"], ["d"], ["e", "f", "g"]]
        assert await wire.reader.readline() == b"0\r\n"

    run(test)


def test_pipelined_requests_are_answered_in_order() -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(post("/generate_stream") + post("/tokens", b'{"text":"abc"}') + post("/generate"))
        assert (await wire.answer())[2].count(b"data:") == 2
        assert (await wire.answer())[2] == b'{"ntokens":3}'
        assert (await wire.answer())[0] == 200

    run(test)


def test_http_1_0_gets_no_chunks() -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(post("/generate_stream", version="1.0"))
        head, _, body = (await wire.end()).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head
        assert body.startswith(b"data:{")
        assert body.endswith(b'"details":null}\n\n')

    run(test)


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"nonsense\r\n\r\n", 400, "bad_json"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "bad_json"),
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400, "bad_json"),
        (b"GET /health HTTP/1.1\r\nx: " + b"a" * 40_000 + b"\r\n\r\n", 431, "too_large"),
        (b"GET /health HTTP/1.1\r\n" + b"x: 1\r\n" * 8_000 + b"\r\n", 431, "too_large"),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", 431, "too_large"),
        (b"GET /health HTTP/1.1\r\nx: " + b"a" * 100_000, 431, "too_large"),
    ],
)
def test_broken_http_gets_the_envelope(data: bytes, status: int, code: str) -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(data)
        got, headers, body = await wire.answer()
        assert (got, code_of(body)) == (status, code)
        assert headers["connection"] == "close"
        assert headers["x-request-id"].startswith("req_")
        assert await wire.end() == b""

    run(test)


def test_slow_headers_and_slow_bodies_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.api.protocol.HEAD_LIMIT_S", 0.1)
    monkeypatch.setattr("lightllm.api.call.BODY_LIMIT_S", 0.1)
    monkeypatch.setattr("lightllm.api.protocol.DISCARD_LIMIT_S", 0.1)

    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(b"GET /health HTT")
        status, _, body = await wire.answer()
        assert (status, code_of(body)) == (408, "body_timeout")
        wire = await connect()
        await wire.send(post("/generate")[:-5])
        status, _, body = await wire.answer()
        assert (status, code_of(body)) == (408, "body_timeout")
        assert await wire.end() == b""
        wire = await connect()
        assert await wire.end() == b""

    run(test)


def test_an_early_answer_does_not_break_the_connection() -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(post("/generate", b" " * 300_000))
        status, _, body = await wire.answer()
        assert (status, code_of(body)) == (413, "too_large")
        await wire.send(post("/generate"))
        assert (await wire.answer())[0] == 200

    run(test, server={"max_request_bytes": 1000})


def test_endless_bodies_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.api.protocol.MAX_DISCARDED_BYTES", 100_000)

    async def test(context, connect) -> None:
        wire = await connect()
        head = post("/generate", b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
        await wire.send(head)

        async def send_forever() -> None:
            while True:
                await wire.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")

        with pytest.raises(OSError):
            await send_forever()

    run(test, server={"max_request_bytes": 1000})


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
@pytest.mark.parametrize("num_bytes", [100, 200_000])
def test_a_client_that_leaves_cancels_its_request(path: str, num_bytes: int) -> None:
    async def test(context, connect) -> None:
        engine = context.engine
        engine.resumed.clear()
        wire = await connect()
        await wire.send(post(path, b'{"inputs":"hi","prompt":"hi"}'.ljust(num_bytes)))
        await wait_for(lambda: engine.requests)
        wire.writer.close()
        await wait_for(lambda: engine.aborted)
        assert engine.aborted == [(engine.requests[0].request_id, "abort")]
        await wait_for(lambda: context.metrics.failures)
        assert dict(context.metrics.failures) == {("499", "client_gone"): 1}

    run(test)


def test_a_client_that_leaves_in_mid_stream_cancels_it() -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(post("/generate_stream", b'{"inputs":"hi","parameters":{"max_new_tokens":90000}}'))
        await wire.reader.readuntil(b"data:")
        wire.writer.transport.abort()
        await wait_for(lambda: context.engine.aborted)
        await wait_for(lambda: context.generator.num_live == 0)

    run(test, reply=[97] * 100_000, max_len=200_000)


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.api.protocol.MAX_UNSENT_BYTES", 100_000)

    async def test(context, connect) -> None:
        wire = await connect()
        wire.writer.transport.pause_reading()
        wire.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await wire.send(post("/generate_stream", b'{"inputs":"hi","parameters":{"max_new_tokens":90000}}'))
        await wait_for(lambda: context.engine.aborted)
        other = await connect()
        await other.send(post("/generate"))
        assert (await other.answer())[0] == 200

    run(test, reply=[97] * 100_000, max_len=200_000)


def test_an_error_in_mid_stream_closes_the_connection() -> None:
    async def test(context, connect) -> None:
        from lightllm.messages import RequestFailure

        context.engine.failures = [RequestFailure(code="engine_down", message="died")]
        context.engine.fail_after = 1
        wire = await connect()
        await wire.send(post("/generate_stream"))
        status, _, body = await wire.answer()
        assert status == 200
        assert body.endswith(b'"code":"engine_down"},"message":"died"}\n\n')
        assert await wire.end() == b""

    run(test)


def test_head_and_expect() -> None:
    async def test(context, connect) -> None:
        wire = await connect()
        await wire.send(b"HEAD /health HTTP/1.1\r\nhost: 127.0.01:8000\r\n\r\n")
        assert b"200 OK" in await wire.reader.readuntil(b"\r\n\r\n")
        head, _, body = post("/generate", extra="expect: 100-continue\r\n").partition(b"\r\n\r\n")
        await wire.send(head + b"\r\n\r\n")
        assert await wire.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await wire.send(body)
        assert (await wire.answer())[0] == 200
        refused = post("/generate", extra="expect: 100-continue\r\ncontent-encoding: br\r\n")
        await wire.send(refused.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        assert (await wire.answer())[0] == 415
        assert await wire.end() == b""

    run(test)
