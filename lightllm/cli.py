"""The command line: parser and `--help`, generated from `config.FLAGS`, and LightLLM's old spellings.

Turns text into typed values within their ranges; rules between flags are `resolution`'s. Written by hand
because argparse abbreviates, lets the last of two values win and tells `_` from `-`. Must start fast: no
torch, no numpy.
"""

import difflib
import math
import os.path
import re
import textwrap
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from lightllm.addresses import is_address, normalize_host, split_addresses
from lightllm.config import FLAGS
from lightllm.env import PREFIX, read_flag_variables
from lightllm.errors import ConfigError, LightLLMError
from lightllm.flag import BUILT_STAGES, MAX_INT, Arguments, FlagSpec

HELP_WIDTH = 100
# The form of a key that fits into one HTTP header, one environment variable and a comma list.
_SECRET = re.compile(r"[!-+\--~]+")
_URL = re.compile(r"https?://[^\s/]+(/\S*)?")
_ORIGIN = re.compile(r"\*|https?://[^\s/]+")
_QUANT_PREFIXES = ("vllm-", "deepgemm-", "triton-")


def _names() -> dict[str, FlagSpec]:
    return {name: spec for spec in FLAGS.values() for name in (spec.name, *spec.flag.aliases)}


NAMES: Mapping[str, FlagSpec] = MappingProxyType(_names())


class OldFlag(NamedTuple):
    """A flag of LightLLM that is not one of ours: accepted with a warning, or refused, and why."""

    is_accepted: bool
    why: str


_MULTIMODAL = OldFlag(False, "images and audio are not served")
_ATTENTION = OldFlag(False, "choose the kernels with --attention_backend")

OLD_FLAGS: Mapping[str, OldFlag] = MappingProxyType(
    {
        "use_dynamic_prompt_cache": OldFlag(True, "the prefix cache is always on"),
        "diverse_mode": OldFlag(True, "samples of one request always share their prompt"),
        "health_monitor": OldFlag(True, "the engine is always supervised; see --restart_policy"),
        "disable_aggressive_schedule": OldFlag(
            True, "superseded: admission always leaves room for running requests"
        ),
        "enable_fa3": _ATTENTION,
        "enable_flashinfer_prefill": _ATTENTION,
        "enable_flashinfer_decode": _ATTENTION,
        "mode": OldFlag(False, "choose the type of the KV cache with --kv_cache_dtype"),
        "zmq_mode": OldFlag(False, "local processes always use private ipc sockets"),
        "multinode_httpmanager_port": OldFlag(
            False, "one control link serves all machines; see --multinode_port"
        ),
        "multinode_router_gloo_port": OldFlag(
            False, "one control link serves all machines; see --multinode_port"
        ),
        "use_config_server_to_init_nccl": OldFlag(
            False, "the config_server hands out no ids; see --nccl_host"
        ),
        "enable_mps": OldFlag(False, "CUDA MPS is used whenever its daemon runs, without a flag"),
        "metric_gateway": OldFlag(False, "metrics are read from GET /metrics, never pushed"),
        "use_tgi_api": OldFlag(False, "the TGI dialect is not served; use /generate or /v1/completions"),
        "use_reward_model": OldFlag(False, "reward models are not served"),
        "trust_remote_code": OldFlag(False, "code that comes with a model is never run"),
        "return_all_prompt_logprobs": OldFlag(
            False, "ask per request with echo and logprobs on /v1/completions"
        ),
        "enable_multimodal": _MULTIMODAL,
        "enable_multimodal_audio": _MULTIMODAL,
        "disable_extra_process_for_multimodal": _MULTIMODAL,
        "cache_capacity": _MULTIMODAL,
        "cache_reserved_ratio": _MULTIMODAL,
    }
)
OLD_PREFIXES: Mapping[str, OldFlag] = MappingProxyType(
    {
        "router_": OldFlag(False, "the scheduler has one token budget; see --batch_max_tokens"),
        "visual_": _MULTIMODAL,
        "audio_": _MULTIMODAL,
    }
)


class Given(NamedTuple):
    """One flag as it stands in the argument list: `argv[first:last]` holds it with its texts."""

    spec: FlagSpec
    spelled: str
    texts: list[str]
    first: int
    last: int


def parse(argv: Sequence[str], environ: Mapping[str, str], *, takes_model: bool = False) -> Arguments:
    """Parse a command line and the `LIGHTLLM_<FLAG>` variables; the command line wins.

    Args:
        argv: arguments without the program's name.
        environ: the environment.
        takes_model: one argument without a flag is allowed and means `--model_dir` (`lightllm serve MODEL`).

    Raises:
        ConfigError: unknown flag, wrong type, out of range, given twice with different values, unreadable
            @file.
    """
    warnings: list[str] = []
    merged = _Merged(warnings)
    for given in scan(argv, takes_model=takes_model, warnings=warnings):
        merged.add(given)
    on_command_line = set(merged.values)
    variables = read_flag_variables(environ, NAMES.keys())
    warnings.extend(variables.warnings)
    for variable, text in variables.texts.items():
        spec = NAMES[variable[len(PREFIX) :].lower()]
        if spec.name not in on_command_line:
            texts = [part.strip() for part in text.split(",")] if spec.is_many else [text]
            merged.add(Given(spec, variable, texts, 0, 0))
    return Arguments(values=merged.values, spelled=merged.spelled, warnings=warnings)


def wants(argv: Sequence[str], *options: str) -> bool:
    """Whether one of `--help`, `-h`, `--version` stands on its own in the command line."""
    return any(token in options for token in argv)


def scan(argv: Sequence[str], *, takes_model: bool, warnings: list[str]) -> list[Given]:
    """Split a command line into flags and their texts; old spellings are judged here.

    Raises:
        ConfigError: an unknown or refused flag, a missing value, or an argument without a flag.
    """
    found: list[Given] = []
    at = 0
    while at < len(argv):
        token = argv[at]
        if not token.startswith("--"):
            if takes_model and not token.startswith("-"):
                found.append(Given(FLAGS["model_dir"], "MODEL", [token], at, at + 1))
                at += 1
                continue
            if at == len(argv) - 1 and token.strip() in ("", "\\"):
                warnings.append(
                    f"the last argument, {token!r}, is a line continuation without a next line: ignored"
                )
                break
            raise ConfigError(f"unexpected argument {token!r}; flags start with --, see --help")
        written, equals, text = token.partition("=")
        name = written[2:].replace("-", "_")
        spec = NAMES.get(name)
        if spec is None:
            at = _skip_old_flag(name, argv, at, warnings)
            continue
        last = at + 1
        if equals:
            texts = [text]
        elif spec.value_type is bool:
            texts = ["1"]
        else:
            while (
                last < len(argv) and not argv[last].startswith("--") and (last == at + 1 or spec.flag.is_list)
            ):
                last += 1
            texts = list(argv[at + 1 : last])
            if not texts:
                raise ConfigError(f"{written} needs a value; see --help")
        if spec.flag.is_list:
            texts = [part for text in texts for part in text.split(",")]
        found.append(Given(spec, written, texts, at, last))
        at = last
    return found


def _skip_old_flag(name: str, argv: Sequence[str], at: int, warnings: list[str]) -> int:
    """Judge a flag that is not in our table; return the index behind it if it may stay."""
    written, equals, text = argv[at].partition("=")
    if name == "load_way":
        last = at + 1 if equals else at + 2
        value = text if equals else "".join(argv[at + 1 : last])
        if value != "HF":
            raise ConfigError(f"{written}: got {value!r}, only HF is known; leave it out")
        return last
    old = OLD_FLAGS.get(name) or next(
        (OLD_PREFIXES[key] for key in OLD_PREFIXES if name.startswith(key)), None
    )
    if old is None:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f"; did you mean --{near[0]}" if near else ""
        raise ConfigError(f"{written}: no such flag{hint}; see --help")
    if not old.is_accepted:
        raise ConfigError(f"{written}: not supported: {old.why}")
    warnings.append(f"{written}: no effect: {old.why}")
    return at + 1


class _Merged:
    """Typed values by flag name; refuses a second, different value."""

    def __init__(self, warnings: list[str]) -> None:
        self.values: dict[str, Any] = {}
        self.spelled: dict[str, str] = {}
        self.warnings = warnings

    def add(self, given: Given) -> None:
        spec, spelled = given.spec, given.spelled
        items = [convert(spec, text, spelled, self.warnings) for text in given.texts]
        value: Any = tuple(items) if spec.is_many else items[0]
        if spec.name in self.values:
            earlier = self.values[spec.name]
            if spec.flag.is_repeatable:
                value = tuple(dict.fromkeys(earlier + value))
            elif value != earlier:
                shown = "two different values" if spec.flag.is_secret else f"{earlier!r} and {value!r}"
                both = " and ".join(dict.fromkeys((self.spelled[spec.name], spelled)))
                raise ConfigError(f"{both}: given twice, {shown}; give it once")
        self.values[spec.name] = value
        self.spelled.setdefault(spec.name, spelled)


def convert(spec: FlagSpec, text: str, spelled: str, warnings: list[str]) -> Any:
    """Turn the text of one value into its type and check its range.

    Raises:
        ConfigError: names the flag as the user spelled it, what was got and what is allowed.
    """
    flag = spec.flag
    if flag.is_secret:
        return _secret(text, spelled, warnings)
    if text == flag.unset == spec.default_text and not spec.is_many:
        return spec.default
    if spec.value_type is bool:
        if text not in ("0", "1"):
            raise ConfigError(f"{spelled}: got {text!r}, allowed 1 or 0")
        return text == "1"
    if spec.value_type in (int, float):
        return _number(spec, text, spelled)
    if spec.value_type is dict:
        return _json_object(text, spelled)
    if not text or not text.isprintable():
        raise ConfigError(f"{spelled}: got {text!r}, allowed one or more printable characters")
    if flag.choices:
        return _choice(spec, text, spelled, warnings)
    return _checked_text(flag.kind, text, spelled, warnings)


def _number(spec: FlagSpec, text: str, spelled: str) -> int | float:
    flag = spec.flag
    number: int | float = math.nan
    if spec.value_type is int and re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        number = int(text)
    elif spec.value_type is float and re.fullmatch(
        r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text
    ):
        number = float(text)
    is_inside = flag.low < number < flag.high if flag.is_open else flag.low <= number <= flag.high
    if not is_inside:
        raise ConfigError(f"{spelled}: got {text[:80]!r}, allowed {allowed_range(spec)}")
    return number


def allowed_range(spec: FlagSpec) -> str:
    """Say in words which numbers a flag takes."""
    flag = spec.flag
    kind = "an integer" if spec.value_type is int else "a number"
    if flag.high == MAX_INT:
        return f"{kind} {'>' if flag.is_open else '>='} {flag.low:g}"
    if flag.is_open:
        return f"{kind} between {flag.low:g} and {flag.high:g}, both excluded"
    return f"{kind} in {flag.low:.0f}..{flag.high:.0f}"


def _choice(spec: FlagSpec, text: str, spelled: str, warnings: list[str]) -> str:
    flag = spec.flag
    word = dict(flag.synonyms).get(text, text)
    if spec.name == "quant_type":
        prefix = next((prefix for prefix in _QUANT_PREFIXES if word.startswith(prefix)), "")
        word = word.removeprefix(prefix)
        if prefix and word in flag.choices:
            warnings.append(f"{spelled}: {text} is read as {word}; kernels are chosen by themselves")
    if word not in flag.choices:
        near = difflib.get_close_matches(word, flag.choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{spelled}: got {text!r}, allowed {', '.join(flag.choices)}{hint}")
    return word


def _checked_text(kind: str, text: str, spelled: str, warnings: list[str]) -> str:
    if kind == "host":
        host = normalize_host(text)
        if not is_address(host):
            raise ConfigError(f"{spelled}: got {text!r}, allowed an IPv4 or IPv6 address or a host name")
        if host != text:
            warnings.append(f"{spelled}: {text} is read as {host}")
        return host
    if kind == "path":
        return os.path.expanduser(text)
    if kind == "store" and text != "memory":
        _check_store(text, spelled)
    patterns = {"url": (_URL, "http(s)://..."), "origin": (_ORIGIN, "* or http(s)://HOST[:PORT]")}
    if kind in patterns:
        pattern, allowed = patterns[kind]
        if not pattern.fullmatch(text):
            raise ConfigError(f"{spelled}: got {text!r}, allowed {allowed}")
    return text


def _check_store(text: str, spelled: str) -> None:
    scheme, _, addresses = text.partition("://")
    try:
        if scheme != "etcd":
            raise ValueError("there is no other kind of store")
        split_addresses(addresses)
    except ValueError as error:
        allowed = "memory or etcd://HOST:PORT[,HOST:PORT]"
        raise ConfigError(f"{spelled}: got {text!r}, allowed {allowed}: {error}") from error


def _json_object(text: str, spelled: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise ConfigError(f"{spelled}: got {text[:80]!r}, allowed a JSON object: {error}") from error


def _secret(text: str, spelled: str, warnings: list[str]) -> str:
    """Read a secret; it is part of no message."""
    source = spelled
    if text.startswith("@"):
        source = f"{spelled} {text}"
        try:
            with open(os.path.expanduser(text[1:]), encoding="utf-8") as file:
                text = file.read(4096).strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{source}: the file cannot be read: {error}") from error
    elif spelled.startswith("--"):
        warnings.append(exposed_secret(spelled))
    if not _SECRET.fullmatch(text):
        raise ConfigError(
            f"{source}: a secret has one or more printable ASCII characters, no space and no comma; "
            "correct it (its text is not shown here)"
        )
    return text


def exposed_secret(spelled: str) -> str:
    """Word the warning about a secret on the command line."""
    name = spelled[2:].replace("-", "_")
    return (
        f"{spelled}: every user of this machine can read a command line; use {spelled} @FILE or the variable "
        f"{PREFIX}{name.upper()}"
    )


def move_secrets(argv: Sequence[str], *, takes_model: bool = False) -> tuple[list[str], dict[str, str]]:
    """Take literal secrets out of a command line.

    Returns:
        The command line without them, and the variables that mean the same. `@file` stays where it is, unless
        literal ones of the same flag have to go.
    """
    found = scan(argv, takes_model=takes_model, warnings=[])
    literal = {
        given.spec.name for given in found if given.spec.flag.is_secret and not given.texts[0].startswith("@")
    }
    kept: list[str] = list(argv)
    variables: dict[str, list[str]] = {}
    for given in reversed(found):
        if given.spec.name in literal:
            del kept[given.first : given.last]
            variables.setdefault(PREFIX + given.spec.name.upper(), []).insert(0, given.texts[0])
    return kept, {name: ",".join(dict.fromkeys(texts)) for name, texts in variables.items()}


def format_error(error: LightLLMError) -> str:
    """Lay an error out as one block for stderr."""
    return "error: " + "\n       ".join(error.message.splitlines())


def format_help() -> str:
    """Write the text of `--help`: every flag of the table under its section, with its real default."""
    lines = [
        "usage: python -m lightllm.server.api_server FLAGS",
        "       lightllm serve [MODEL] FLAGS",
        "",
        "An LLM server. In flag names - and _ are the same; --flag value and --flag=value too. Any flag may",
        "come from the environment as LIGHTLLM_<FLAG>; the command line wins. Flags and values marked with *",
        "are reserved: this version refuses them; a reserved flag may be given its own default.",
        "",
        "  --help, --version",
    ]
    title = ""
    for spec in FLAGS.values():
        if spec.title != title:
            title = spec.title
            lines += ["", f"{title}:"]
        lines += _help_rows(spec)
    return "\n".join(lines) + "\n"


def _help_rows(spec: FlagSpec) -> list[str]:
    flag = spec.flag
    mark = "" if flag.stage in BUILT_STAGES or spec.section == "graph" else " *"
    head = f"  --{spec.name}{_metavar(spec)}{mark}"
    words = flag.help
    if flag.aliases:
        words += f" (also --{', --'.join(flag.aliases)})"
    if flag.is_repeatable:
        words += "; may be repeated"
    words += f" [default: {spec.default_text}]"
    return [head, *textwrap.wrap(words, HELP_WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)]


def _metavar(spec: FlagSpec) -> str:
    flag = spec.flag
    if spec.value_type is bool:
        return ""
    if flag.choices:
        stages = dict(flag.choice_stages)
        marked = (word if stages.get(word, "S") in BUILT_STAGES else f"{word}*" for word in flag.choices)
        return " {" + ",".join(marked) + "}"
    by_kind = {"host": "ADDRESS", "path": "PATH"}
    by_type = {int: "INT", float: "NUMBER", dict: "JSON"}
    word = flag.metavar or by_kind.get(flag.kind) or by_type.get(spec.value_type, "TEXT")
    if word in ("INT", "NUMBER") and flag.high != MAX_INT:
        word = f"{flag.low:g}..{flag.high:.0f}"
    return f" {word} ..." if flag.is_list else f" {word}"
