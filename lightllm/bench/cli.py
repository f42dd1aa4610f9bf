"""`lightllm bench` and test/benchmark_client.py: flags, the order of a run, exit codes.

Knows no tokenizer: whoever starts it hands in a loader, so that this package stays a client of the server.
"""

import argparse
import asyncio
import difflib
import resource
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import uvloop

from lightllm.bench.http_client import CallFailed, HttpClient, Url, parse_url
from lightllm.bench.load import APIS, Api, LoadRun
from lightllm.bench.progress import progress_view
from lightllm.bench.report import RunFacts, dump, format_report, show_existing, summarise
from lightllm.bench.server_info import ServerInfo, ask_server, cached_tokens
from lightllm.bench.workload import (
    Job,
    LocalCodec,
    ServerCodec,
    TextCodec,
    Tokenizer,
    make_jobs,
    output_lengths,
)
from lightllm.errors import ConfigError, LightLLMError

DEFAULT_ORIGIN = "http://127.0.0.1:8000"
SPARE_FILES = 64

LoadTokenizer = Callable[[str], Tokenizer]


class Target(NamedTuple):
    """Where requests go; `prefix` stands before the paths of the server's other routes."""

    url: Url
    path: str
    prefix: str


class _Parser(argparse.ArgumentParser):
    """Names the nearest flag for an unknown one; takes `-` for `_` inside names."""

    def flags(self, argv: Sequence[str]) -> argparse.Namespace:
        tidy = []
        for word in argv:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = "--" + name[2:].replace("-", "_")
            tidy.append(name + equals + value)
        known, unknown = self.parse_known_args(tidy)
        if unknown:
            names = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; nearest is {near[0]}" if near else ""))
        return known

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _at_least(least: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(least - 1)
        if not least <= value < 2**31:
            raise argparse.ArgumentTypeError(f"got {text}, allowed {kind.__name__} >= {least}")
        return value

    return parse


def _server_api(text: str) -> str:
    if text == "triton":
        raise argparse.ArgumentTypeError("triton is not served; use lightllm, openai or openai_chat")
    if text not in APIS:
        raise argparse.ArgumentTypeError(f"got {text}, allowed {', '.join(APIS)}")
    return text


def _build_parser(prog: str) -> _Parser:
    parser = _Parser(prog=prog, allow_abbrev=False, description="Measure a running server.")

    def add(name: str, default: object, help_text: str, **kwargs: Any) -> None:
        shown = "" if default is None or default is False else f" (default: {default})"
        parser.add_argument(f"--{name}", default=default, help=help_text + shown, **kwargs)

    positive = _at_least(1, int)
    add(
        "url",
        None,
        f"full URL; a missing path is --server_api's (default: {DEFAULT_ORIGIN}/generate_stream)",
    )
    add("tokenizer_path", None, "model folder, .gguf file or hub id; without it the server counts")
    add("num_clients", 100, "requests sent at the same time (closed loop)", type=positive)
    add("input_num", 2000, "number of requests", type=positive)
    add("input_len", 1024, "exact prompt length in tokens", type=positive)
    add("output_len", 128, "mean output length in tokens", type=positive)
    add("server_api", "lightllm", f"one of {', '.join(APIS)}", type=_server_api)
    add("dump_file", None, "write the results here as JSON; if it exists, show it and do not run")
    add("overwrite", False, "run although --dump_file exists", action="store_true")
    add("seed", 0, "prompts, lengths and arrival times follow from it", type=int)
    add("model", None, "model name sent to the server (default: the one it serves)")
    add("api_key", None, "key of the server; @FILE reads it from a file")
    add("timeout", 600.0, "seconds for one request", type=_at_least(0.001, float))
    add("warmup", 8, "requests sent before the clock starts", type=_at_least(0, int))
    add(
        "input_qps",
        0.0,
        "mean requests/s at random moments; 0 = closed loop",
        type=_at_least(0, float),
    )
    add("fixed_output_len", False, "every output has exactly --output_len tokens", action="store_true")
    return parser


def read_key(text: str | None) -> str | None:
    """The key itself; `@FILE` names a file that holds it.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not text or not text.startswith("@"):
        return text or None
    try:
        key = Path(text[1:]).expanduser().read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise ConfigError(f"--api_key {text}: {exc.strerror}") from None
    if not key or len(key.split()) != 1:
        raise ConfigError(f"--api_key {text}: the file must hold one key and nothing else")
    return key


def resolve_target(text: str | None, api: Api) -> Target:
    """The address to send to.

    Raises:
        ConfigError: not an address, or the route of another dialect.
    """
    url = parse_url(text or DEFAULT_ORIGIN)
    if not url.path:
        return Target(url, api.path, "")
    for other in APIS.values():
        if other.name != api.name and url.path.endswith(other.path):
            raise ConfigError(f"--url {text}: {other.path} needs --server_api {other.name}, got {api.name}")
    return Target(url, url.path, url.path.removesuffix(api.path) if url.path.endswith(api.path) else "")


def main(
    argv: Sequence[str], load_tokenizer: LoadTokenizer | None = None, prog: str = "lightllm bench"
) -> int:
    """Run the benchmark client.

    Args:
        argv: the flags, without the program's name.
        load_tokenizer: loads what `--tokenizer_path` names; without it that flag is refused.
        prog: the program's name in messages.

    Returns:
        0 if every request was valid or an earlier result was shown, 1 if a request was not, 2 for a bad flag.
    """
    try:
        args = _build_parser(prog).flags(argv)
        dump_file = Path(args.dump_file) if args.dump_file else None
        if dump_file is not None and dump_file.exists() and not args.overwrite:
            show_existing(dump_file, sys.stdout)
            return 0
        if dump_file is not None and not dump_file.parent.is_dir():
            raise ConfigError(f"--dump_file {dump_file}: there is no folder {dump_file.parent}")
        if args.tokenizer_path and load_tokenizer is None:
            raise ConfigError("--tokenizer_path: no tokenizer loader in this program; leave the flag out")
        bench = Bench(args, shlex.join([*prog.split(), *_masked(argv)]))
        if bench.target.url.note:
            print(bench.target.url.note, file=sys.stderr)
        if args.tokenizer_path and load_tokenizer is not None:
            bench.tokenizer = load_tokenizer(args.tokenizer_path)
        summary = bench.run()
        print(format_report(summary))
        if dump_file is not None:
            dump(summary, dump_file)
            print(f"Results have been written to {dump_file}")
    except LightLLMError as exc:
        print(f"{prog}: {exc.message}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted before the first request", file=sys.stderr)
        return 1
    return 0 if summary["request_num"] == summary["all_request_num"] else 1


def _masked(argv: Sequence[str]) -> list[str]:
    """The command line without the key."""
    words, is_key = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        if is_key and not word.startswith("@"):
            word = "***"
        is_key = name.replace("-", "_") == "__api_key"
        words.append(f"{name}=***" if is_key and equals else word)
    return words


class Bench:
    """One run: prompts, warm-up, load, summary."""

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self.tokenizer: Tokenizer | None = None
        self._args = args
        self._command = command
        self._api = APIS[args.server_api]
        self.target = resolve_target(args.url, self._api)
        self._facts: RunFacts | None = None
        self._load: LoadRun | None = None
        self._key = read_key(args.api_key)

    def run(self) -> dict[str, Any]:
        """Do it all; an interrupt ends the run early and keeps what is done.

        Raises:
            LightLLMError: no server, or no such prompts; nothing was measured.
        """
        _allow_open_files(self._args.num_clients)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                runner.run(self._run())
            except KeyboardInterrupt:
                if self._load is None or self._facts is None or not self._load.results:
                    raise
        assert self._load is not None
        assert self._facts is not None
        self._facts.duration_s = self._load.duration_s
        return summarise(self._load.results, self._facts)

    async def _run(self) -> None:
        args, target = self._args, self.target
        client = HttpClient(target.url, api_key=self._key, timeout_s=args.timeout)
        try:
            server = await self._find_server(client)
            jobs = await self._make_jobs(self._codec(client))
            model = args.model or server.model or "default_model_name"
            self._facts = self._make_facts(server, model)
            load = LoadRun(client, self._api, path=target.path, model=model)
            failure = await load.warm_up(jobs[args.input_num :])
            if failure is not None:
                print(f"warm-up failed: {failure.failure}: {failure.message}", file=sys.stderr)
            cached = await cached_tokens(client, target.prefix)
            self._load = load
            with progress_view("running", args.input_num) as progress:
                await load.run(
                    jobs[: args.input_num],
                    num_clients=args.num_clients,
                    input_qps=args.input_qps,
                    seed=args.seed,
                    progress=progress,
                )
            await self._note_cached(client, cached)
        finally:
            client.close()

    async def _note_cached(self, client: HttpClient, before: int | None) -> None:
        try:
            after = await cached_tokens(client, self.target.prefix)
        except CallFailed:
            return  # the server has gone; the failures in the report say so
        if before is not None and after is not None and self._facts is not None:
            self._facts.cached_prompt_tokens = after - before

    async def _find_server(self, client: HttpClient) -> ServerInfo:
        try:
            return await ask_server(client, self.target.prefix)
        except CallFailed as exc:
            if exc.failure == "connect":
                exc.message += "; start the server first, or name another one with --url"
            raise

    def _codec(self, client: HttpClient) -> TextCodec:
        is_chat = self._api.name == "openai_chat"
        if self.tokenizer is not None:
            return LocalCodec(self.tokenizer, is_chat=is_chat)
        return ServerCodec(client, self.target.prefix, is_chat=is_chat)

    async def _make_jobs(self, codec: TextCodec) -> list[Job]:
        args = self._args
        lengths = output_lengths(
            args.input_num + args.warmup, args.output_len, seed=args.seed, is_fixed=args.fixed_output_len
        )
        with progress_view("making prompts", len(lengths), unit="") as progress:
            return await make_jobs(
                codec,
                args.input_len,
                lengths,
                seed=args.seed,
                report=lambda num: progress.update(num, 0, 0),
            )

    def _make_facts(self, server: ServerInfo, model: str) -> RunFacts:
        args = self._args
        return RunFacts(
            backend=self._api.name,
            clients=args.num_clients,
            url=f"{self.target.url.origin}{self.target.path}",
            model=model,
            server=str(server),
            command=self._command,
            seed=args.seed,
            input_len=args.input_len,
            output_len=args.output_len,
            input_qps=args.input_qps,
            num_jobs=args.input_num,
            duration_s=0.0,
        )


def _allow_open_files(num_clients: int) -> None:
    """Raise the soft limit of open files if every client needs a socket of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_clients + SPARE_FILES
    if soft < needed and soft != resource.RLIM_INFINITY:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
