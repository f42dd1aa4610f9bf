"""Raw connections to a real server on loopback, for tests that look at bytes."""

import asyncio
import json
from collections.abc import Awaitable, Callable

from lightllm.api.call import AppContext
from tests.api.harness import make_context, serving
from tests.fakes import FakeEngineClient

BODY = json.dumps({"inputs": "hi", "parameters": {"max_new_tokens": 2}}).encode()


def post(path: str, body: bytes = BODY, version: str = "1.1", extra: str = "") -> bytes:
    head = f"POST {path} HTTP/{version}\r\nhost: x\r\ncontent-type: application/json\r\n{extra}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Wire:
    """A raw client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """One answer by content-length or chunks; (status, headers, body)."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        if "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        else:
            body = await self.reader.read()
        return int(head[0].split(" ")[1]), headers, body

    async def end(self) -> bytes:
        """Everything up to the end of the connection."""
        return await self.reader.read()


Test = Callable[[AppContext, Callable[[], Awaitable[Wire]]], Awaitable[None]]


def run(
    test: Test, reply: str | list[int] = "hello", max_len: int = 256, **sections: dict[str, object]
) -> None:
    async def main() -> None:
        engine = FakeEngineClient(reply)
        engine.info = type(engine.info)(
            **{
                **{f: getattr(engine.info, f) for f in engine.info.__struct_fields__},
                "max_req_total_len": max_len,
            }
        )
        context = make_context(engine, **sections)
        async with serving(context) as port:
            wires: list[Wire] = []

            async def connect() -> Wire:
                wires.append(Wire(*await asyncio.open_connection("127.0.0.1", port)))
                return wires[-1]

            try:
                await asyncio.wait_for(test(context, connect), 20)
            finally:
                for wire in wires:
                    wire.writer.close()

    asyncio.run(main())


def code_of(body: bytes) -> str:
    envelope = json.loads(body)
    assert envelope["message"] == envelope["error"]["message"]
    return str(envelope["error"]["code"])


async def wait_for(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  a poll is enough here
        await asyncio.sleep(0.005)
