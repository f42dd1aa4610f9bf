"""Many streams read by one thread, as fast as raw sockets allow: the client's side of the benchmarks.

`read_polled` costs the server least and counts; `read_timed` keeps everything with the time of its arrival.
"""

import json
import re
import select
import socket
import time
from dataclasses import dataclass, field

POLL_S = 0.01
END = b"0\r\n\r\n"
ROUTES = {
    "generate_stream": ("/generate_stream", {"inputs": "hi", "parameters": {"ignore_eos": True}}),
    "completions": ("/v1/completions", {"prompt": "hi", "stream": True, "ignore_eos": True}),
    "chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "hi"}], "stream": True, "ignore_eos": True},
    ),
}
_TEXT = re.compile(rb'"text":"([^"]*)"')


@dataclass
class Answers:
    """What all streams brought.

    Attributes:
        end_s: monotonic time of the last byte.
        pieces: of each stream, (monotonic time, bytes) of every read; `read_timed` only.
    """

    end_s: float = 0.0
    num_bytes: int = 0
    num_frames: int = 0
    pieces: list[list[tuple[float, bytes]]] = field(default_factory=list)


def open_streams(ports: list[int], streams: int, tokens: int, route: str) -> list[socket.socket]:
    """Send `streams` requests, an equal part to each port."""
    path, body = ROUTES[route]
    fields = {**body, "max_tokens": tokens, "model": "bench"}
    if "parameters" in body:
        fields = {**body, "parameters": {**body["parameters"], "max_new_tokens": tokens}}
    data = json.dumps(fields).encode()
    lines = ("host: x", "content-type: application/json", f"content-length: {len(data)}")
    head = "\r\n".join((f"POST {path} HTTP/1.1", *lines, "", "")).encode()
    clients = []
    for i in range(streams):
        client = socket.create_connection(("127.0.0.1", ports[i * len(ports) // streams]))
        client.sendall(head + data)
        client.setblocking(False)
        clients.append(client)
    return clients


def read_polled(clients: list[socket.socket]) -> Answers:
    """Read all streams to their ends, every POLL_S what has come.

    A client that waited for each token would have the server's core wake it up for every one, which clients
    behind a network do not.
    """
    answers = Answers()
    tails = dict.fromkeys(clients, b"")
    while tails:
        time.sleep(POLL_S)
        for client, tail in list(tails.items()):
            try:
                data = client.recv(1 << 20)
            except BlockingIOError:
                continue
            answers.num_bytes += len(data)
            answers.num_frames += data.count(b"\n\n")
            tails[client] = _tail(tail, data)
            if tails[client] == END:
                del tails[client]
                client.close()
    answers.end_s = time.monotonic()
    return answers


def read_timed(clients: list[socket.socket], *, is_awake: bool) -> Answers:
    """Read all streams to their ends, each byte as soon as it is there.

    Args:
        is_awake: wait without sleep, so that the server's core never has to wake this one up; for a core that
            nobody else needs.
    """
    answers = Answers(pieces=[[] for _ in clients])
    by_fd = {client.fileno(): i for i, client in enumerate(clients)}
    tails = [b""] * len(clients)
    epoll = select.epoll()
    for client in clients:
        epoll.register(client, select.EPOLLIN)
    num_open = len(clients)
    while num_open:
        for fd, _ in epoll.poll(0 if is_awake else None):
            i = by_fd[fd]
            data = clients[i].recv(1 << 16)
            answers.pieces[i].append((time.monotonic(), data))
            answers.num_bytes += len(data)
            tails[i] = _tail(tails[i], data)
            if tails[i] == END:
                epoll.unregister(fd)
                clients[i].close()
                num_open -= 1
    epoll.close()
    answers.end_s = time.monotonic()
    return answers


def arrivals(pieces: list[tuple[float, bytes]]) -> list[tuple[float, str]]:
    """Time of arrival and text of each token of one stream whose frames have a `text`."""
    found = []
    buffer = b""
    for at_s, data in pieces:
        *frames, buffer = (buffer + data).split(b"\n\n")
        for frame in frames:
            match = _TEXT.search(frame)
            if match is not None and match[1]:
                found.append((at_s, match[1].decode()))
    return found


def _tail(tail: bytes, data: bytes) -> bytes:
    if not data:
        raise SystemExit("the server cut a stream off")
    return (tail + data[-len(END) :])[-len(END) :]
