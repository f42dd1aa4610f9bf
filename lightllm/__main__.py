"""The `lightllm` command: `lightllm serve|chat|bench|doctor`, also `python -m lightllm`.

Only picks the program; each parses its own arguments and is imported when it is called for.
"""

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from lightllm import __version__

if TYPE_CHECKING:
    from lightllm.frontend.tokenizer import Tokenizer

USAGE = """\
usage: lightllm COMMAND ...

  lightllm serve [MODEL] FLAGS           serve a model over HTTP
  lightllm chat [MODEL] [--url URL]      chat in the terminal, with a running server or a private one
  lightllm bench FLAGS                   load a running server and report what it does
  lightllm doctor [FLAGS] [--json]       check machine, model folder, ports and peers

Each command has --help.
"""

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "serve": "lightllm.server.api_server",
        "chat": "lightllm.bench.chat",
        "bench": "lightllm.bench.cli",
        "doctor": "lightllm.server.doctor",
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; `sys.argv` when left out.

    Returns:
        The command's exit code; 2 if there is no such command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"lightllm {__version__}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        problem = f"no such command: {command!r}{hint}" if command else "a command is missing"
        print(f"error: {problem}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[command])
    if command == "bench":
        return int(module.main(rest, load_tokenizer))
    if command != "serve":
        return int(module.main(rest))
    if argv is None:
        module.hide_secrets(rest, takes_model=True)
    return int(module.main(rest, takes_model=True))


def load_tokenizer(path: str) -> "Tokenizer":
    """Open the tokenizer of what `--model_dir` accepts, for the benchmark client, which may not do so."""
    from lightllm.server.model_files import locate_tokenizer, open_tokenizer

    return open_tokenizer(locate_tokenizer(path))


if __name__ == "__main__":
    raise SystemExit(main())
