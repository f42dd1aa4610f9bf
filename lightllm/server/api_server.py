"""Entry of the server in every role: `python -m lightllm.server.api_server FLAGS`.

Parses, resolves, and either prints the configuration (`--dry_run`) or hands it to `launch`. Everything
heavier than the flag table is imported inside functions, so that `--help` answers at once. Runs in the
supervisor process.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightllm import __version__
from lightllm.cli import exposed_secret, format_error, format_help, move_secrets, parse, wants
from lightllm.env import PREFIX
from lightllm.errors import ConfigError, LightLLMError, ModelLoadError

if TYPE_CHECKING:
    from lightllm.config import Config
    from lightllm.model_config import ModelConfig
    from lightllm.resolution import Resolution


def main(argv: Sequence[str] | None = None, *, takes_model: bool = False) -> int:
    """Serve until stopped, or answer `--help`, `--version` or `--dry_run`.

    Args:
        argv: arguments without the program's name; `sys.argv` when left out.
        takes_model: `lightllm serve MODEL`: one argument may stand without a flag.

    Returns:
        The exit code: 0 clean, 1 run-time failure, 2 bad flag, 3 model cannot be loaded, 4 address cannot be
        bound.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if wants(arguments, "--help", "-h"):
        sys.stdout.write(format_help())
        return 0
    if wants(arguments, "--version"):
        print(f"lightllm {__version__}")
        return 0
    try:
        return _serve(arguments, takes_model=takes_model)
    except LightLLMError as error:
        print(format_error(error), file=sys.stderr)
        return error.exit_code


def hide_secrets(argv: Sequence[str], *, takes_model: bool = False) -> None:
    """Start this program anew with literal secrets moved from the command line into the environment.

    The process title is the command line the kernel was given; a process cannot change it from Python.
    Returns if there is nothing to move or if the command line is wrong, which `main` then reports.

    Args:
        argv: the last arguments of this process (`sys.argv[1:]`, or less a subcommand).
        takes_model: as for `main`.
    """
    if wants(argv, "--help", "-h", "--version", "--dry_run", "--dry-run"):
        return
    try:
        parse(argv, {}, takes_model=takes_model)
        kept, variables = move_secrets(argv, takes_model=takes_model)
    except LightLLMError:
        return
    if not variables:
        return
    for name in variables:
        print(
            f"warning: {exposed_secret('--' + name.removeprefix(PREFIX).lower())}",
            file=sys.stderr,
            flush=True,
        )
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(argv)]
    os.execve(sys.executable, [sys.executable, *before, *kept], {**os.environ, **variables})


def _serve(argv: Sequence[str], *, takes_model: bool) -> int:
    from lightllm.env import read_environment
    from lightllm.resolution import resolve
    from lightllm.server.machine import probe

    args = parse(argv, os.environ, takes_model=takes_model)
    machine = probe(os.environ)
    environment = read_environment(os.environ, num_cores=machine.num_cores)
    # Flags are judged before anything is looked for, and again with the model's dimensions.
    resolution = resolve(args, environment, machine, None)
    config = resolution.config
    if config.server.dry_run:
        at_hand = _model_at_hand(config)
        _print_dry_run(resolve(args, environment, machine, at_hand.model_config), at_hand)
        return 0
    template = config.model.chat_template
    if template is not None and not os.path.isfile(template):
        raise ConfigError(f"--chat_template {template}: no such file")
    if config.server.run_mode != "config_server":
        from lightllm.server.model_files import describe_model

        resolution = resolve(args, environment, machine, describe_model(config).config)
    _start_log(resolution)
    from lightllm.server.launch import launch

    return launch(resolution.config)


class _ModelAtHand(NamedTuple):
    """What can be said of a model without downloading it, and why nothing can."""

    model_config: "ModelConfig | None" = None
    unchecked: str = ""
    not_built: str = ""


def _model_at_hand(config: "Config") -> _ModelAtHand:
    from lightllm.server.model_files import describe_files, locate_model

    if config.server.run_mode == "config_server":
        return _ModelAtHand()
    model = config.model
    try:
        files = locate_model(model.model_dir, model.load_format, allow_download=False)
    except ModelLoadError as error:
        return _ModelAtHand(unchecked=f"--model_dir {model.model_dir}: not checked: {error.message}")
    try:
        return _ModelAtHand(describe_files(files, model.override_config).config)
    except ModelLoadError as error:
        return _ModelAtHand(not_built=f"--model_dir {model.model_dir}: {error.message}")


def _print_dry_run(resolution: "Resolution", at_hand: _ModelAtHand) -> None:
    import msgspec

    unchecked = [*resolution.unchecked, at_hand.unchecked]
    template = resolution.config.model.chat_template
    if template is not None and not os.path.isfile(template):
        unchecked.append(f"--chat_template {template}: no such file here")
    report = resolution.config.flags()
    report["not_built"] = [text for text in (*resolution.not_built, at_hand.not_built) if text]
    report["unchecked"] = [text for text in unchecked if text]
    report["warnings"] = resolution.warnings
    print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())


def _start_log(resolution: "Resolution") -> None:
    import logging

    import msgspec

    from lightllm.logs import setup_logging

    config = resolution.config
    setup_logging(config.observability.log_format, config.observability.log_level, "server")
    logger = logging.getLogger(__name__)
    for warning in resolution.warnings:
        logger.warning("%s", warning)
    logger.info("lightllm %s, resolved flags: %s", __version__, msgspec.json.encode(config.flags()).decode())


if __name__ == "__main__":
    hide_secrets(sys.argv[1:])
    raise SystemExit(main())
