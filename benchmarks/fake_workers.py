"""Plays a prefill and decode workers over HTTP: what routers of other servers stand in front of.

    python benchmarks/fake_workers.py [--streams 256] [--tokens 400] [--step_ms 5] [--decode_nodes 1]

One process, a port for each worker. GETs (health, model) get a small JSON answer; a POST to the prefill
worker, too; one to a decode worker gets a stream of Server-Sent Events. Once `--streams` streams are there,
each step writes a token to every one of them. The text of a token is the time at which its step began to be
written: the moment at which `fake_nodes` would have sent its frame.

Says on stdout: `ready PREFILL_PORT DECODE_PORT...`; `start SECONDS` like `fake_nodes`. Ends with its stdin.
"""

import argparse
import asyncio
import sys
import time

LEAD_S = 0.3
FACTS = b'{"status":"ok","model_path":"bench","served_model_name":"bench","tp_size":1,"dp_size":1}'
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
# As long as what a pd_master writes for the same token.
CHUNK = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1760000000,'
    b'"model":"bench","choices":[{"index":0,"text":"%.6f","logprobs":null,"finish_reason":null}]}\n\n'
)


class Worker(asyncio.Protocol):
    """One connection to a worker."""

    def __init__(self, streams: list[asyncio.Transport] | None, on_stream: asyncio.Event) -> None:
        self._streams = streams
        self._on_stream = on_stream
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, rest = self._buffer.partition(b"\r\n\r\n")
            length = next(
                (
                    int(line[15:])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length:")
                ),
                0,
            )
            if len(rest) < length:
                return
            self._buffer = rest[length:]
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        assert self._transport is not None
        if head.startswith(b"PRI "):  # HTTP/2: somebody tries whether this is gRPC
            self._buffer = b""
            self._transport.close()
        elif head.startswith(b"GET ") or self._streams is None:
            length = b"content-length: %d" % len(FACTS)
            lines = (b"HTTP/1.1 200 OK", b"content-type: application/json", length, b"", FACTS)
            self._transport.write(b"\r\n".join(lines))
        else:
            self._transport.write(STREAM_HEAD)
            self._streams.append(self._transport)
            self._on_stream.set()


async def run(args: argparse.Namespace) -> None:
    """From the ports to the last step."""
    loop = asyncio.get_running_loop()
    on_stream = asyncio.Event()
    streams: list[list[asyncio.Transport]] = [[] for _ in range(args.decode_nodes)]

    async def listen(mine: list[asyncio.Transport] | None) -> int:
        server = await loop.create_server(lambda: Worker(mine, on_stream), "127.0.0.1", 0, backlog=1024)
        port: int = server.sockets[0].getsockname()[1]
        return port

    ports = [await listen(None), *[await listen(mine) for mine in streams]]
    print("ready", *ports, flush=True)
    while sum(map(len, streams)) < args.streams:
        await on_stream.wait()
        on_stream.clear()
    start_s = time.monotonic() + LEAD_S
    print(f"start {start_s}", flush=True)
    step_s = args.step_ms / 1000
    await asyncio.gather(
        *(
            decode(mine, start_s + i * step_s / len(streams), step_s, args.tokens)
            for i, mine in enumerate(streams)
        )
    )
    print("{}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


async def decode(streams: list[asyncio.Transport], next_s: float, step_s: float, tokens: int) -> None:
    """All steps of one worker."""
    for _ in range(1, tokens):  # as many steps as those of `fake_nodes`
        await asyncio.sleep(max(0.0, next_s - time.monotonic()))
        next_s += step_s
        data = CHUNK % time.monotonic()
        for stream in streams:
            stream.write(b"%x\r\n%b\r\n" % (len(data), data))
    for stream in streams:
        stream.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def main() -> int:
    """Play until stdin ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="per stream")
    parser.add_argument("--step_ms", type=float, default=5.0, help="time between two steps of a worker")
    parser.add_argument("--decode_nodes", type=int, default=1)
    args = parser.parse_args()
    import uvloop

    uvloop.run(run(args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
