"""What counts as JSON from a client, and how a body becomes a typed request."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightllm.api import parsing
from lightllm.api.parsing import parse_json, parse_request
from lightllm.errors import RequestError


class Inner(msgspec.Struct):
    size: int | None = None
    share: float | None = None
    is_on: bool | None = None
    ids: list[int] | None = None
    bias: dict[int, float] | None = None


class Outer(msgspec.Struct):
    name: str
    inner: Inner | None = None


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"nope", "not valid JSON"),
        (b'{"a":1', "not valid JSON"),
        (b'{"a":1}x', "not valid JSON"),
        (b'["\xff\xfe"]', "not UTF-8"),
        (b'{"a":1,"a":2}', "'a' occurs twice"),
        (b'{"x":{"b":1,"b":1}}', "'b' occurs twice"),
        (b'[[1],[2,{"a":[{},{"b":1,"b":1}]}]]', "'b' occurs twice"),
        (b'{"a":NaN}', "not valid JSON"),
        (b"[Infinity]", "not valid JSON"),
        (b"[-Infinity]", "not valid JSON"),
        (b"[1e400]", "out of range"),
        (b"[-1e400]", "out of range"),
        (b"[" + b"9" * 5000 + b"]", "out of range"),
        (rb'["\ud800"]', "not valid JSON"),
        (rb'{"\udfff":1}', "surrogate"),
        (b"[" + b"[]," * 70_000 + b"[]]", "more than 65536 lists and objects"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(131_073)) + b"}", "more than 131072 keys"),
        (b"[" + b'"",' * 262_144 + b'""]', "more than 262144 strings"),
        (rb'{"text":"\":","a":1,"a":2}', "'a' occurs twice"),
        (rb'{"a\\":1,"a\\":2}', "occurs twice"),
        (b'{"a" :1,"a"\n:2}', "'a' occurs twice"),
        (nested(65), "deeper than 64"),
        (nested(10_000), "deeper than 64"),
        (b'{"a":' * 10_000, "deeper than 64"),
    ],
)
def test_bad_json_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        parse_json(body)
    assert caught.value.code == "bad_json"


def test_what_stands_in_strings_does_not_count() -> None:
    text = json.dumps({"a": [1, {"b": "c:,"}], "d\\": '\\"'}) * 70_000
    assert parse_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}


@given(
    st.recursive(
        st.text(st.sampled_from('ab\\"[]{}:,\n\u00e4')) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(st.sampled_from('a\\":,[{')), inner)
        ),
        max_leaves=20,
    ),
    st.integers(1, 9),
    st.booleans(),
)
def test_what_stands_outside_of_strings_is_counted_wherever_the_text_is_cut(value, size, is_ascii) -> None:
    def count(node):
        if isinstance(node, dict):
            inner, own = list(node.values()), (1, len(node), len(node))
        else:
            inner, own = (node, (1, 0, 0)) if isinstance(node, list) else ([], (0, 0, isinstance(node, str)))
        return [sum(column) for column in zip(own, *map(count, inner), strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "_PIECE_BYTES", size)
        assert list(parsing._size_of(json.dumps(value, ensure_ascii=is_ascii).encode())) == count(value)


def test_good_json_is_kept() -> None:
    assert parse_json(rb'{"a":["\ud83d\ude00","\u0000",1e300,-0.0,9223372036854775808]}') == {
        "a": ["\U0001f600", "\x00", 1e300, -0.0, 2**63]
    }
    assert parse_json(nested(64)) is not None
    assert parse_json(rb'{"a":"\"x\": 1, \"x\": 2","b":[{"c":{}}]}')["b"] == [{"c": {}}]
    assert parse_json(b"[" + b"[]," * 500 + b"[]]") == [[]] * 501


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"null", "wrong_type", None),
        (b"[]", "wrong_type", None),
        (b'"x"', "wrong_type", None),
        (b"{}", "missing_field", "name"),
        (b'{"name":1}', "wrong_type", "name"),
        (b'{"name":null}', "wrong_type", "name"),
        (b'{"name":"x","inner":[]}', "wrong_type", "inner"),
        (b'{"name":"x","inner":{"size":true}}', "wrong_type", "inner.size"),
        (b'{"name":"x","inner":{"size":"10"}}', "wrong_type", "inner.size"),
        (b'{"name":"x","inner":{"size":1.5}}', "wrong_type", "inner.size"),
        (b'{"name":"x","inner":{"share":"1"}}', "wrong_type", "inner.share"),
        (b'{"name":"x","inner":{"share":true}}', "wrong_type", "inner.share"),
        (b'{"name":"x","inner":{"is_on":1}}', "wrong_type", "inner.is_on"),
        (b'{"name":"x","inner":{"ids":[1,false]}}', "wrong_type", "inner.ids[1]"),
        (b'{"name":"x","inner":{"bias":{"x":1}}}', "wrong_type", "inner.bias"),
    ],
)
def test_types_are_exact(body: bytes, code: str, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(body, Outer)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_null_is_the_default_and_ints_are_floats() -> None:
    body = b'{"name":"x","inner":{"size":null,"share":1,"bias":{"5":-1}}}'
    value, ignored = parse_request(body, Outer)
    assert value == Outer(name="x", inner=Inner(share=1.0, bias={5: -1.0}))
    assert ignored == []


def test_unknown_fields_are_named_or_refused() -> None:
    body = b'{"name":"x","extra":1,"inner":{"sise":2}}'
    value, ignored = parse_request(body, Outer)
    assert value == Outer(name="x", inner=Inner())
    assert ignored == ["extra", "inner.sise"]
    with pytest.raises(RequestError, match=r"inner\.sise: unknown field; did you mean size\?") as caught:
        parse_request(b'{"name":"x","inner":{"sise":2}}', Outer, strict_fields=True)
    assert (caught.value.code, caught.value.param) == ("unknown_field", "inner.sise")


def test_messages_say_what_and_what_else() -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(b'{"name":"x","inner":{"size":"10"}}', Outer)
    assert caught.value.message == "inner.size: got str, allowed int"


def test_any_value_fits_any() -> None:
    class Open(msgspec.Struct):
        value: Any = None

    assert parse_request(b'{"value":{"a":[1]}}', Open)[0].value == {"a": [1]}
