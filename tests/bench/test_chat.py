"""The terminal chat, as its own process with piped input and on a pseudo-terminal, against a fake server."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from lightllm.bench.private_server import PrivateServer, ServerFailed
from tests.bench.fake_server import FakeServer, chunked, whole

START = "import sys; from lightllm.bench.chat import main; sys.exit(main(sys.argv[1:]))"
CHAT = [
    sys.executable,
    "-c",
    "import sys; from lightllm.bench.chat import main; sys.exit(main(sys.argv[1:]))",
]
ROUTE = "/v1/chat/completions"


def frame(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def words(*texts, error=None):
    frames = [frame(choices=[{"delta": {"content": text}, "finish_reason": None}]) for text in texts]
    if error:
        choice = {"delta": {}, "finish_reason": "error"}
        return [*frames, frame(choices=[choice], error={"message": error}, message=error)]
    usage = {"completion_tokens": len(texts), "prompt_tokens": 3}
    return [*frames, frame(choices=[], usage=usage), b"data: [DONE]\n\n"]


def echo(request):
    return chunked(words("You said: ", request.body["messages"][-1]["content"]))


def talk(server, lines, *flags):
    return subprocess.run(
        [*CHAT, "--url", server.url, *flags],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
    )


def conversations(server):
    """The messages of each request, as role and text."""
    asked = [request.body for request in server.requests if request.path == ROUTE]
    return [[(m["role"], m["content"]) for m in body["messages"]] for body in asked]


def test_a_conversation_is_kept_and_forgotten():
    with FakeServer({ROUTE: echo}) as server:
        done = talk(server, ["one", "", "two", "/reset", "//three", "/exit", "four"])
    assert done.returncode == 0
    assert done.stdout == "You said: one\nYou said: two\nYou said: /three\n"
    assert conversations(server) == [
        [("user", "one")],
        [("user", "one"), ("assistant", "You said: one"), ("user", "two")],
        [("user", "/three")],
    ]
    assert "forgotten" in done.stderr
    body = next(request.body for request in server.requests if request.path == ROUTE)
    assert (body["model"], body["stream"], body["stream_options"]) == ("tiny", True, {"include_usage": True})


def test_the_system_message():
    with FakeServer({ROUTE: echo}) as server:
        done = talk(server, ["/system", "hi", "/system be brief", "hi", "/nonsense"], "--system", "be kind")
    assert conversations(server) == [
        [("system", "be kind"), ("user", "hi")],
        [("system", "be brief"), ("user", "hi")],
    ]
    assert "system message: be kind" in done.stderr
    assert "/nonsense: no such command" in done.stderr


@pytest.mark.parametrize(
    ("answer", "message", "partial"),
    [
        (lambda r: whole({"message": "too long"}, 400), "HTTP 400: too long", ""),
        (lambda r: chunked(words("par", "tial", error="engine down")), "engine down", "partial\n"),
        (lambda r: chunked(words("half")[:1], is_cut=True), "closed the connection", "half\n"),
        (lambda r: chunked(words("half")[:1]), "ended in its middle", "half\n"),
        (lambda r: chunked([b"data: {\n\n"]), "not as agreed", ""),
    ],
)
def test_a_failed_answer_is_said_and_the_chat_goes_on(answer, message, partial):
    def first_fails(request):
        return answer(request) if server.paths().count(ROUTE) == 1 else echo(request)

    with FakeServer({ROUTE: first_fails}) as server:
        done = talk(server, ["one", "two"])
    assert done.returncode == 1
    assert done.stdout == f"{partial}You said: two\n"
    assert message in done.stderr
    kept = [("user", "one"), ("assistant", partial.strip())] if partial else []
    assert conversations(server)[1] == [*kept, ("user", "two")]


def test_text_cannot_steer_the_terminal():
    with FakeServer(
        {ROUTE: lambda r: chunked(words("\x1b]0;title\x07a", "\x9b2J[b] :smile:\tc\nd"))}
    ) as server:
        done = talk(server, ["hi"])
    assert done.stdout == "]0;titlea2J[b] :smile:\tc\nd\n"


def test_no_server_and_no_key(tmp_path):
    with FakeServer({"/v1/models": lambda r: whole({"message": "a key is needed"}, 401)}) as server:
        done = talk(server, ["hi"])
    assert (done.returncode, done.stdout) == (1, "")
    assert "a key is needed" in done.stderr
    done = talk(server, ["hi"])  # it has gone by now
    assert done.returncode == 1
    assert "cannot connect" in done.stderr


def test_keys_and_short_addresses():
    with FakeServer({ROUTE: echo}) as server:
        server_url = f"http://127.0.01:{server.port}{ROUTE}"
        done = subprocess.run(
            [*CHAT, "--url", server_url, "--api_key", "secret"],
            input="hi",
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stdout == "You said: hi\n"
    assert "address 127.0.01 means 127.0.0.1" in done.stderr
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer secret"}


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, command):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, os.environ | {"TERM": "xterm"})
        self.seen = ""

    def wait_for(self, text, typing="", timeout_s=30.0):
        """Read until `text` has been shown (again), typing now and then."""
        until = time.monotonic() + timeout_s
        while text not in self.seen:
            assert time.monotonic() < until, self.seen
            self.type(typing)  # again: input() misses a Ctrl-C that comes just before it sleeps
            if select.select([self.fd], [], [], 0.5)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def type(self, text):
        os.write(self.fd, text.encode())


def test_ctrl_c_stops_the_answer_but_not_the_chat():
    def slow(request):
        if request.body["messages"][-1]["content"] != "long":
            return echo(request)
        return chunked(words(*(f"w{i} " for i in range(10000))))

    with FakeServer({ROUTE: slow}) as server:
        server.delay_s = 0.02
        terminal = Terminal([*CHAT, "--url", server.url])
        terminal.wait_for("> ")
        terminal.wait_for("Ctrl-D leaves", typing="\x03")
        terminal.type("long\n")
        terminal.wait_for("w3 ")
        terminal.type("\x03")
        terminal.wait_for("stopped")
        terminal.type("short\n")
        terminal.wait_for("You said: short")
        terminal.wait_for("token/s")
        terminal.type("/exit\n")
        _, status = os.waitpid(terminal.pid, 0)
        os.close(terminal.fd)
    assert os.waitstatus_to_exitcode(status) == 0
    stopped = conversations(server)[1]
    assert stopped[0] == ("user", "long")
    assert re.match("w0 w1 w2 ", stopped[1][1])


FAKE_SERVER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("loading weights", file=sys.stderr, flush=True)
if "--model_dir" in sys.argv:
    print("error: no such path: nowhere", file=sys.stderr)
    sys.exit(3)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
print("some other line\\nready: http://127.0.0.1:1234 model=tiny mode=normal", flush=True)
time.sleep(60)
"""


def test_a_private_server_lives_as_long_as_the_chat(tmp_path):
    seen = []
    loaded = tmp_path / "loaded"

    def on_progress(line):
        seen.append(line)
        loaded.touch()

    command = (sys.executable, "-c", FAKE_SERVER, str(loaded))
    with PrivateServer(None, on_progress, command=command) as server:
        assert (server.url, server.model) == ("http://127.0.0.1:1234", "tiny")
        assert len(server.api_key) == 32
        process = server._process
        assert process.poll() is None
        assert os.getsid(process.pid) != os.getsid(0)  # Ctrl-C on our terminal does not reach it
    assert process.returncode == 0
    assert seen == ["loading weights"]


def test_a_private_server_that_fails_says_why():
    command = (sys.executable, "-c", FAKE_SERVER)
    with pytest.raises(ServerFailed, match=r"^no such path: nowhere$") as caught:
        PrivateServer("nowhere", lambda line: None, command=command).__enter__()
    assert caught.value.exit_code == 3
