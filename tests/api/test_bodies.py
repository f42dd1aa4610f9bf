"""Bodies of many clients at once: what they take together is bounded, and given back however they end."""

import asyncio
import contextlib

import pytest

from lightllm.api.bodies import SMALL_BODY_BYTES, Bodies
from lightllm.errors import CapacityError
from tests.api.wire import BODY, Wire, code_of, post, run, wait_for

KIB = 1024
LARGE = BODY + b" " * (300 * KIB - len(BODY))
REST = 20 * KIB
ROOM = {"max_request_bytes": 512 * KIB}
CHUNKED = post("/generate", b"").replace(b"content-length: 0", b"transfer-encoding: chunked")


@pytest.fixture(autouse=True)
def _little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.api.bodies.MAX_BODIES_BYTES", 1024 * KIB)  # 768 of them for large bodies


async def begin(context, wire: Wire) -> None:
    """Send a large body but for its end, and wait until it has been received."""
    before = context.bodies.num_bytes
    await wire.send(post("/generate", LARGE)[:-REST])
    await wait_for(lambda: context.bodies.num_bytes == before + len(LARGE) - REST)


async def expect(wire: Wire, status: int, code: str | None = None) -> dict[str, str]:
    got, headers, body = await asyncio.wait_for(wire.answer(), 5)
    assert got == status, body
    assert code is None or code_of(body) == code
    return headers


@pytest.mark.parametrize("is_announced", [True, False])
def test_large_bodies_beyond_the_common_room_are_turned_away(is_announced: bool) -> None:
    async def test(context, connect) -> None:
        first, second, third, small = [await connect() for _ in range(4)]
        await begin(context, first)
        await begin(context, second)
        body = post("/generate", LARGE) if is_announced else CHUNKED + b"%x\r\n" % len(LARGE) + LARGE
        await third.send(body)
        headers = await expect(third, 429, "queue_full")
        assert headers["retry-after"] == "1"
        await small.send(post("/generate", BODY + b" " * 8 * KIB))
        await expect(small, 200)
        await first.send(LARGE[-REST:])
        await expect(first, 200)
        again = await connect()
        await again.send(post("/generate", LARGE))
        await expect(again, 200)

    run(test, server=ROOM)


def test_room_is_given_back_however_a_body_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(context, connect) -> None:
        gone = await connect()
        await begin(context, gone)
        gone.writer.transport.abort()
        await wait_for(lambda: context.bodies.num_bytes == 0)
        for body, status, code in [
            (post("/generate", b"{" + b" " * 100 * KIB), 400, "bad_json"),
            (CHUNKED + b"19000\r\n" + b" " * 100 * KIB + b"\r\nZZ\r\n", 400, "bad_json"),
            (CHUNKED + b"%x\r\n" % (600 * KIB) + b" " * 600 * KIB, 413, "too_large"),
        ]:
            wire = await connect()
            await wire.send(body)
            await expect(wire, status, code)
            assert context.bodies.num_bytes == 0
        monkeypatch.setattr("lightllm.api.call.BODY_LIMIT_S", 0.1)
        late = await connect()
        await begin(context, late)
        await expect(late, 408, "body_timeout")
        assert context.bodies.num_bytes == 0

    run(test, server=ROOM)


def test_the_last_quarter_is_for_small_bodies() -> None:
    bodies = Bodies(512 * KIB)
    with bodies.share() as large, bodies.share() as late:
        large.take(768 * KIB - 1)
        with pytest.raises(CapacityError, match="limit of 786432 for bodies of more than 65536 bytes"):
            late.expect(SMALL_BODY_BYTES + 1)
        late.expect(SMALL_BODY_BYTES)
        late.take(SMALL_BODY_BYTES)
        with pytest.raises(CapacityError):
            late.take(1)  # it is a large one now
        with contextlib.ExitStack() as small:
            for _ in range(3):
                small.enter_context(bodies.share()).take(SMALL_BODY_BYTES)
            with pytest.raises(CapacityError, match="limit of 1048576 for bodies;"):
                small.enter_context(bodies.share()).take(2)
            small.enter_context(bodies.share()).take(1)
    assert bodies.num_bytes == 0


def test_there_is_room_for_a_body_of_any_size_that_is_allowed() -> None:
    with Bodies(1 << 34).share() as share:
        share.expect(1 << 34)
        share.take(1 << 34)
