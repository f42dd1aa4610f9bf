"""From body bytes to a typed request: the one place where JSON from clients is read.

Stricter than json or msgspec alone: duplicate keys, NaN, Infinity, numbers beyond a double, lone surrogates,
deep nesting and bytes that are not UTF-8 are all refused with a code of the error table. Pure functions, no
I/O.
"""

import difflib
import functools
import json
import re
from typing import Any, NamedTuple, TypeVar, get_args

import msgspec

from lightllm.errors import RequestError

MAX_DEPTH = 64
# The event loop stands still while a body is decoded, and other threads with it. 16 MiB of text take some
# milliseconds, of token ids two tenths of a second; containers, keys and strings by the million would take
# more than one.
MAX_CONTAINERS = 65_536
MAX_KEYS = 131_072
MAX_STRINGS = 262_144
_PIECE_BYTES = 64 * 1024
T = TypeVar("T", bound=msgspec.Struct)

_CONTAINERS = frozenset((dict, list))
_LOCATION = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
_EXPECTED = re.compile(r"^Expected `(?P<expected>.*)`, got `(?P<got>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>.*)`$", re.DOTALL)


class Parsed(NamedTuple):
    """A converted body and the names of the fields that have no effect, as paths."""

    value: Any
    ignored: list[str]


def parse_json(body: bytes | bytearray) -> Any:
    """Parse one JSON text from a client.

    Raises:
        RequestError: code bad_json, saying what is wrong and where.
    """
    if not body:
        raise _bad("the body is empty; send one JSON object")
    size = _size_of(body)
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _bad(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # Which of the two bytes that are not UTF-8 bring depends on msgspec's version.
        if not _is_utf8(body):
            raise _bad("the body is not UTF-8") from None
        raise _bad(f"the body is not valid JSON: {str(error)[:200]}") from None
    # Each key of the text has its colon: where there are fewer keys than that, one was written twice.
    if size.num_keys > _count_keys(value, size.num_containers):
        _check_unique(body)
    return value


def parse_request(
    body: bytes | bytearray, kind: type[T], *, strict_fields: bool = False
) -> tuple[T, list[str]]:
    """Parse a body and convert it to `kind`, types exact.

    Args:
        strict_fields: refuse unknown fields instead of listing them.

    Returns:
        The request, and the paths of its unknown fields.

    Raises:
        RequestError: bad_json, missing_field, wrong_type, out_of_range or unknown_field; `param` is the
            field's path.
    """
    raw = parse_json(body)
    ignored = _unknown_fields(raw, kind, "", strict_fields)
    try:
        return msgspec.convert(raw, kind, strict=True, str_keys=True), ignored
    except msgspec.ValidationError as error:
        raise _translate(str(error)) from None


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean X?`, or nothing."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _bad(message: str) -> RequestError:
    return RequestError(message, code="bad_json")


def _is_utf8(body: bytes | bytearray) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


class _Size(NamedTuple):
    """How many lists and objects, keys, and strings, keys among them, a JSON text has."""

    num_containers: int
    num_keys: int
    num_strings: int


def _size_of(body: bytes | bytearray) -> _Size:
    """Count by what stands outside of strings; refuses what has too much of it, before it is decoded."""
    limits = {"lists and objects": MAX_CONTAINERS, "keys": MAX_KEYS, "strings": MAX_STRINGS}
    size, num_quotes, begin = _Size(0, 0, 0), 0, 0
    while begin < len(body):
        piece = bytes(body[begin : begin + _PIECE_BYTES])
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # cut in the middle of an escape
            piece = bytes(body[begin : begin + _PIECE_BYTES + 1])
        begin += len(piece)
        parts = piece.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
        outside = b"".join(parts[num_quotes % 2 :: 2])
        num_quotes += len(parts) - 1
        size = _Size(
            size.num_containers + outside.count(b"[") + outside.count(b"{"),
            size.num_keys + outside.count(b":"),
            num_quotes // 2,
        )
        for count, (kind, limit) in zip(size, limits.items(), strict=True):
            if count > limit:
                raise _bad(f"the body has more than {limit} {kind}; send it in parts")
    return size


def _count_keys(value: Any, num_containers: int) -> int:
    """How many keys all objects have together; refuses what is nested too deep.

    Args:
        num_containers: how many containers there are.
    """
    num_keys = 0
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        num_containers -= len(level)
        for node in level:
            if type(node) is dict:
                num_keys += len(node)
                below += [child for child in node.values() if type(child) in _CONTAINERS]
            # Long lists are mostly token ids: not looked at where no bracket is left for a container in them,
            # and in C where there is.
            elif num_containers > 0 and type(node) is list and not _CONTAINERS.isdisjoint(map(type, node)):
                below += [child for child in node if type(child) in _CONTAINERS]
        if not below:
            return num_keys
        level = below
    raise _bad(f"the body is nested deeper than {MAX_DEPTH} levels")


def _check_unique(body: bytes | bytearray) -> None:
    def check(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _bad(f"the key {key[:80]!r} occurs twice in one object")
            seen.add(key)

    json.loads(body, object_pairs_hook=check)


@functools.cache
def _shape(kind: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct] | None]:
    """Field name -> struct type of its value, None for plain values."""
    shape: dict[str, type[msgspec.Struct] | None] = {}
    for field in msgspec.structs.fields(kind):
        options = [field.type, *get_args(field.type)]
        structs = [t for t in options if isinstance(t, type) and issubclass(t, msgspec.Struct)]
        shape[field.encode_name] = structs[0] if structs else None
    return shape


def _unknown_fields(raw: Any, kind: type[msgspec.Struct], path: str, strict: bool) -> list[str]:
    if type(raw) is not dict:
        return []
    shape = _shape(kind)
    unknown: list[str] = []
    for name, value in raw.items():
        if name not in shape:
            if strict:
                message = f"{path}{name[:80]}: unknown field{nearest(name[:80], list(shape))}"
                raise RequestError(message, code="unknown_field", param=path + name[:80])
            unknown.append(path + name)
            continue
        inner = shape[name]
        if inner is not None:
            unknown += _unknown_fields(value, inner, f"{path}{name}.", strict)
    return unknown


def _translate(text: str) -> RequestError:
    located = _LOCATION.match(text)
    what, path = (located["what"], located["path"] or "") if located else (text, "")
    path = path.removesuffix("[...]")  # some key of an object; which one is not said
    if missing := _MISSING.match(what):
        param = ".".join(part for part in (path, missing["field"]) if part)
        return RequestError(f"{param}: required, but missing", code="missing_field", param=param)
    field = path or "body"
    if expected := _EXPECTED.match(what):
        allowed = expected["expected"].removesuffix(" | null")
        message = f"{field}: got {expected['got']}, allowed {allowed}"
        return RequestError(message, code="wrong_type", param=path or None)
    if "out of range" in what:
        return RequestError(f"{field}: number out of range", code="out_of_range", param=path or None)
    return RequestError(f"{field}: {what}", code="wrong_type", param=path or None)
