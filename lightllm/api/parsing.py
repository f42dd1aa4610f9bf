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
# Bounds the memory and time that empty lists and objects by the million would take.
MAX_BRACKETS = 262_144
T = TypeVar("T", bound=msgspec.Struct)

_CONTAINERS = frozenset((dict, list))
_KEY_END = re.compile(rb'"[ \t\r\n]*:')
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
    num_brackets = body.count(b"[") + body.count(b"{")
    if num_brackets > MAX_BRACKETS:
        raise _bad(f"the body has more than {MAX_BRACKETS} opening brackets")
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _bad(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # Which of the two bytes that are not UTF-8 bring depends on msgspec's version.
        if not _is_utf8(body):
            raise _bad("the body is not UTF-8") from None
        raise _bad(f"the body is not valid JSON: {str(error)[:200]}") from None
    # Each key of the text leaves a quote and a colon. Where there are more of these than keys, a key was
    # written twice or a string holds some: only then the slow way is needed to tell.
    if len(_KEY_END.findall(body)) > _count_keys(value, num_brackets):
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


def _count_keys(value: Any, num_brackets: int) -> int:
    """How many keys all objects have together; refuses what is nested too deep.

    Args:
        num_brackets: how many containers there are at most.
    """
    num_keys = 0
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        num_brackets -= len(level)
        for node in level:
            if type(node) is dict:
                num_keys += len(node)
                below += [child for child in node.values() if type(child) in _CONTAINERS]
            # Long lists are mostly token ids: not looked at where no bracket is left for a container in them,
            # and in C where there is.
            elif num_brackets > 0 and type(node) is list and not _CONTAINERS.isdisjoint(map(type, node)):
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
