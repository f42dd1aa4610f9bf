"""`lightllm chat`: a conversation in the terminal, with a running server or a private one.

Talks /v1/chat/completions and keeps the conversation itself. Ctrl-C stops an answer, not the chat. Without a
terminal every input line is a message, answers go to stdout and everything else to stderr. Knows no model.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape

from lightllm.bench.cli import read_key
from lightllm.bench.http_client import CallFailed, HttpClient, SSEParser, parse_url
from lightllm.bench.private_server import PrivateServer
from lightllm.bench.server_info import ask_server
from lightllm.errors import ConfigError, LightLLMError

ROUTE = "/v1/chat/completions"
TIMEOUT_S = 3600.0
COMMANDS = """\
/exit          leave (also Ctrl-D)
/reset         forget the conversation
/system TEXT   set the system message and forget the conversation; without TEXT: show it
/help          this list; a message that begins with / is written with //"""
# A model's text must not move the cursor or set the title: all control characters but two are dropped.
CONTROLS: Mapping[int, None] = MappingProxyType(
    {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Error(msgspec.Struct):
    message: str = "no message"


class _Frame(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class Answer:
    """One streamed answer: shows text as it arrives and keeps it. `feed` is the sink of the HTTP client."""

    def __init__(self, console: Console) -> None:
        self.text = ""
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.is_done = False
        self.started_at = time.perf_counter()
        self.first_at: float | None = None
        self._console = console
        self._events = SSEParser()
        self._decoder = msgspec.json.Decoder(_Frame)

    def feed(self, chunk: bytes) -> None:
        """Take body bytes; never raises."""
        for data in self._events.feed(chunk):
            if data == b"[DONE]":
                self.is_done = True
                continue
            try:
                self._take(self._decoder.decode(data))
            except msgspec.DecodeError as exc:
                self.error = f"the server sent a frame that is not as agreed: {exc}"

    def _take(self, frame: _Frame) -> None:
        if frame.error is not None:
            self.error = frame.error.message
            return
        if frame.usage is not None:
            self.num_tokens = frame.usage.completion_tokens
        for choice in frame.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
            self._show(choice.delta.reasoning_content or "", style="dim")
            self._show(choice.delta.content or "", style=None)
            self.text += choice.delta.content or ""

    def _show(self, text: str, style: str | None) -> None:
        if text and self.first_at is None:
            self.first_at = time.perf_counter()
        shown = text.translate(CONTROLS)
        if style is not None and shown:
            self._console.print(shown, end="", style=style, markup=False, highlight=False, soft_wrap=True)
        elif shown:
            self._console.file.write(shown)  # rich would turn tabs into spaces
            self._console.file.flush()

    def timing(self) -> str:
        """How fast the answer was, in one line."""
        first_s = (self.first_at or time.perf_counter()) - self.started_at
        elapsed_s = max(time.perf_counter() - self.started_at, 1e-9)
        speed = f"{self.num_tokens} tokens, {self.num_tokens / elapsed_s:.1f} token/s, "
        cut = ", cut at the length limit" if self.finish_reason == "length" else ""
        return f"{speed if self.num_tokens else ''}first after {first_s:.2f} s{cut}"


class Chat:
    """The conversation and its commands.

    Args:
        client: calls to the server; `runner` is the loop that they run in.
        prefix: stands before the route.
        model: name to ask for.
        system: system message; empty for none.
        out, notes: where answers go, and everything else.
    """

    def __init__(
        self,
        client: HttpClient,
        runner: asyncio.Runner,
        *,
        prefix: str,
        model: str,
        system: str,
        out: Console,
        notes: Console,
    ) -> None:
        self.num_failed = 0
        self._client = client
        self._runner = runner
        self._path = prefix + ROUTE
        self._model = model
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._out = out
        self._notes = notes

    def take(self, line: str) -> bool:
        """Handle one line of input; False ends the chat."""
        if line.startswith("//"):
            line = line[1:]
        elif line.startswith("/"):
            return self._command(line)
        if line.strip():
            self._ask(line)
        return True

    def _command(self, line: str) -> bool:
        name, _, text = line.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            self._messages.clear()
            self._note("the conversation is forgotten")
        elif name == "/system" and text.strip():
            self._system = text.strip()
            self._messages.clear()
            self._note("system message set; the conversation is forgotten")
        elif name == "/system":
            self._note(f"system message: {self._system or 'none'}")
        elif name == "/help":
            self._note(COMMANDS)
        else:
            self._note(f"{name}: no such command\n{COMMANDS}")
        return True

    def _ask(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        answer = Answer(self._out)
        try:
            self._runner.run(self._receive(answer))
            note = answer.timing() if self._out.is_terminal else ""
        except KeyboardInterrupt:
            note = "stopped"
        except CallFailed as exc:
            note = ""
            answer.error = answer.error or exc.message
        if answer.first_at is not None:
            self._out.print()
        if answer.error is not None:
            self.num_failed += 1
            self._notes.print(f"[red]error:[/] {escape(answer.error.translate(CONTROLS))}", highlight=False)
        elif note:
            self._note(note)
        if answer.text:
            self._messages.append({"role": "assistant", "content": answer.text})
        else:
            self._messages.pop()  # a question without an answer would confuse the next turn

    async def _receive(self, answer: Answer) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        body: dict[str, Any] = {
            "messages": [*system, *self._messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._model:
            body["model"] = self._model
        response = await self._client.post(self._path, body, answer.feed)
        if response.status != 200:
            raise CallFailed("status", response.error_text())
        if not answer.is_done and answer.error is None:
            raise CallFailed("cut", "the answer ended in its middle")

    def _note(self, text: str) -> None:
        self._notes.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _lines(notes: Console) -> Iterator[str]:
    """Input lines until the end of input; Ctrl-C at the prompt only clears the line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    try:
        import readline  # noqa: F401  # line editing and history for input()
    except ImportError:
        pass
    while True:
        try:
            yield input("\n> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            notes.print("\n/exit or Ctrl-D leaves", style="dim")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lightllm chat",
        allow_abbrev=False,
        description="Chat in the terminal.",
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="model folder, .gguf file or hub id for a private server; with --url, a name served there",
    )
    parser.add_argument(
        "--url", help="a running server, e.g. http://127.0.0.1:8000; without it one is started"
    )
    parser.add_argument("--api_key", "--api-key", help="key of that server; @FILE reads it from a file")
    parser.add_argument("--system", default="", help="system message")
    args = parser.parse_args(argv)
    if args.api_key and not args.url:
        parser.error("--api_key needs --url: a private server has a key of its own")
    return args


def main(argv: Sequence[str]) -> int:
    """Chat until the user leaves.

    Returns:
        0; 1 if there is no server, or if input is no terminal and an answer failed; 2 for a bad flag; the
        exit code of the private server if it does not start (3: the model cannot be loaded).
    """
    args = _parse(argv)
    out, notes = Console(emoji=False), Console(stderr=True, emoji=False)
    # A plain end of the process would leave the private server behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        with ExitStack() as stack:
            return _run(args, stack, out, notes)
    except LightLLMError as exc:
        notes.print(f"[red]error:[/] {escape(exc.message)}", highlight=False, soft_wrap=True)
        return exc.exit_code
    except KeyboardInterrupt:
        return 1


def _run(args: argparse.Namespace, stack: ExitStack, out: Console, notes: Console) -> int:
    address, key, model = args.url, read_key(args.api_key), args.model
    if address is None:
        with notes.status("starting a server") as status:
            server = PrivateServer(args.model, lambda line: status.update(escape(line[: notes.width - 4])))
            stack.enter_context(server)
        address, key, model = server.url, server.api_key, server.model
    url = parse_url(address)
    if url.note:
        notes.print(url.note, style="dim")
    if url.path and not url.path.endswith(ROUTE):
        raise ConfigError(f"--url {address}: give the server's address without a path, or with {ROUTE}")
    client = HttpClient(url, api_key=key, timeout_s=TIMEOUT_S)
    runner = stack.enter_context(asyncio.Runner())
    stack.callback(client.close)
    prefix = url.path.removesuffix(ROUTE)
    info = runner.run(ask_server(client, prefix))
    hello = f"{info} at {url.origin}; /help lists commands"
    notes.print(hello, style="dim", markup=False, highlight=False, soft_wrap=True)
    chat = Chat(
        client,
        runner,
        prefix=prefix,
        model=model or info.model,
        system=args.system,
        out=out,
        notes=notes,
    )
    for line in _lines(notes):
        if not chat.take(line):
            break
    return 1 if chat.num_failed and not sys.stdin.isatty() else 0
