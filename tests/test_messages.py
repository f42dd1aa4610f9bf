"""The codec: every message survives the trip, everything else is refused.

Instances are generated from the structs' own type information, so a new message or field is tested by itself.
"""

import math
from functools import cache
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from lightllm import cluster_messages, messages, rank_messages
from lightllm.messages import Message
from lightllm.packed_ints import pack

UNIONS = {
    "ToEngine": messages.ToEngine,
    "FromEngine": messages.FromEngine,
    "ToChild": messages.ToChild,
    "FromChild": messages.FromChild,
    "FromRank": rank_messages.FromRank,
    "ToMachine": rank_messages.ToMachine,
    "FromMachine": rank_messages.FromMachine,
    "ToNode": cluster_messages.ToNode,
    "FromNode": cluster_messages.FromNode,
    "ToWatcher": cluster_messages.ToWatcher,
}
# Sent between engine and worker, where the direction alone tells the type.
DIRECT = {messages.ScheduledBatch, messages.StepOutput, rank_messages.WorkerConfig}
MODULES = (messages, rank_messages, cluster_messages)
STRUCTS = {
    value
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, msgspec.Struct) and not name.startswith("_")
}
MESSAGES = sorted(
    (kind for kind in STRUCTS if issubclass(kind, Message) and kind is not Message),
    key=lambda kind: kind.__name__,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
ATOMS: dict[type, st.SearchStrategy[Any]] = {
    inspect.NoneType: st.none(),
    inspect.BoolType: st.booleans(),
    inspect.IntType: st.integers(-(2**63), 2**63 - 1),
    inspect.FloatType: st.floats(allow_nan=False),
    inspect.StrType: TEXT,
    inspect.BytesType: st.binary(max_size=8),
    # The one type of ours that msgspec does not know: packed numbers.
    inspect.CustomType: st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3).map(pack),
}


def values(info: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a type, from msgspec's description of it."""
    if type(info) in ATOMS:
        return ATOMS[type(info)]
    match info:
        case inspect.StructType(cls=kind):
            return instances(kind)
        case inspect.UnionType(types=kinds):
            return st.one_of(*map(values, kinds))
        case inspect.ListType(item_type=item):
            return st.lists(values(item), max_size=3)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(values, items))
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values(key), values(value), max_size=3)
    raise NotImplementedError(f"no strategy for {info}")


@cache
def instances(kind: type[msgspec.Struct]) -> st.SearchStrategy[msgspec.Struct]:
    """Instances of a struct, every field given."""
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    return st.builds(kind, **{field.name: values(field.type) for field in described.fields})


def parts(kind: type[msgspec.Struct]) -> set[type[msgspec.Struct]]:
    """The struct and all structs inside it."""
    found: set[type[msgspec.Struct]] = set()
    pending: list[Any] = [inspect.type_info(kind)]
    while pending:
        info = pending.pop()
        if isinstance(info, inspect.StructType) and info.cls not in found:
            found.add(info.cls)
            pending += [field.type for field in info.fields]
        pending += getattr(info, "types", ())
        pending += getattr(info, "item_types", ())
        pending += [
            getattr(info, name) for name in ("item_type", "key_type", "value_type") if hasattr(info, name)
        ]
    return found


ALL_STRUCTS = sorted(
    set().union(*map(parts, MESSAGES), parts(cluster_messages.Registration)), key=lambda kind: kind.__name__
)


@pytest.mark.parametrize("kind", ALL_STRUCTS, ids=lambda kind: kind.__name__)
def test_round_trip(kind: type[msgspec.Struct]) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(instances(kind))
    def run(message: msgspec.Struct) -> None:
        data = messages.encode(message)
        again = messages.decode(data, kind)
        assert again == message
        assert type(again) is kind
        assert messages.decoder(kind).decode(data) == message

    run()


def test_every_message_has_a_way() -> None:
    assert {member for union in UNIONS.values() for member in get_args(union)} | DIRECT == set(MESSAGES)


def test_every_public_struct_is_tested() -> None:
    assert STRUCTS - {Message, messages.Part} == set(ALL_STRUCTS)


@pytest.mark.parametrize("name", UNIONS)
def test_union_members_decode_to_their_type(name: str) -> None:
    union = UNIONS[name]

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.one_of(*map(instances, get_args(union))))
    def run(message: msgspec.Struct) -> None:
        again = messages.decode(messages.encode(message), union)
        assert type(again) is type(message)
        assert again == message

    run()


def as_plain(kind: type[msgspec.Struct]) -> Any:
    """Some instance of a struct as the dict or list that goes over the wire."""
    return msgspec.msgpack.decode(messages.encode(example(kind)))


def example(kind: type[msgspec.Struct]) -> msgspec.Struct:
    """The simplest instance: required fields filled, the others at their defaults."""
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    return kind(**{field.name: simplest(field.type) for field in described.fields if field.required})


def simplest(info: inspect.Type) -> Any:
    match info:
        case inspect.StructType(cls=kind):
            return example(kind)
        case inspect.ListType():
            return []
        case inspect.StrType():
            return ""
        case inspect.CustomType():
            return pack()
        case inspect.BytesType():
            return b""
        case inspect.FloatType():
            return 0.0
        case inspect.BoolType():
            return False
        case inspect.IntType():
            return 0
    raise NotImplementedError(f"no example for {info}")


@pytest.mark.parametrize("kind", ALL_STRUCTS, ids=lambda kind: kind.__name__)
def test_unknown_field_is_refused(kind: type[msgspec.Struct]) -> None:
    plain = as_plain(kind)
    longer = [*plain, 1] if isinstance(plain, list) else plain | {"surprise": 1}
    data = msgspec.msgpack.encode(longer)
    with pytest.raises(msgspec.ValidationError):
        messages.decode(data, kind)


@pytest.mark.parametrize("name", UNIONS)
def test_unknown_tag_is_refused(name: str) -> None:
    for tag in ("Surprise", "ScheduledBatch", "", 7):
        with pytest.raises(msgspec.ValidationError):
            messages.decode(msgspec.msgpack.encode({"type": tag}), UNIONS[name])


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_another_message_is_refused(kind: type[Message]) -> None:
    other = messages.Ping(nonce=1) if kind is not messages.Ping else messages.Drain(timeout_s=1.0)
    with pytest.raises(msgspec.ValidationError):
        messages.decode(messages.encode(other), kind)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_missing_field_is_refused(kind: type[Message]) -> None:
    required = [field.encode_name for field in inspect.type_info(kind).fields if field.required]
    for name in required:
        plain = as_plain(kind)
        del plain[name]
        with pytest.raises(msgspec.ValidationError, match=name):
            messages.decode(msgspec.msgpack.encode(plain), kind)


def test_wrong_type_is_refused() -> None:
    for nonce in ("1", 1.5, True, None, [1]):
        data = msgspec.msgpack.encode({"type": "Ping", "nonce": nonce})
        with pytest.raises(msgspec.ValidationError, match="nonce"):
            messages.decode(data, messages.Ping)


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc1", b"\x80\x04K\x01.", b"\x16\x03\x01", b"\xff" * 64])
def test_garbage_is_refused(data: bytes) -> None:
    for union in UNIONS.values():
        with pytest.raises(msgspec.DecodeError):
            messages.decode(data, union)


def test_structs_are_frozen() -> None:
    for kind in ALL_STRUCTS:
        assert kind.__struct_config__.frozen, kind


def test_minus_infinity_survives() -> None:
    logprobs = messages.TokenLogprobs(logprob=-math.inf, top_ids=[1], top_logprobs=[-math.inf])
    assert messages.decode(messages.encode(logprobs), messages.TokenLogprobs) == logprobs
