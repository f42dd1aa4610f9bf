"""Packed numbers: what fits, what does not, and both forms on the wire."""

from array import array

import msgspec
import pytest

from lightllm import messages
from lightllm.messages import EngineRequest
from lightllm.packed_ints import bounds, from_wire, pack, to_wire
from lightllm.sampling_params import SamplingParams


def wire(prompt: object) -> bytes:
    """A request of that prompt as the codec of another program might send it."""
    request = EngineRequest(request_id="a", prompt_token_ids=pack(), sampling_params=SamplingParams())
    plain = msgspec.msgpack.decode(messages.encode(request))
    return msgspec.msgpack.encode(plain | {"prompt_token_ids": prompt})


def test_an_array_is_not_copied() -> None:
    values = pack([3, -1, 2**31 - 1])
    assert pack(values) is values
    assert bounds(values) == (-1, 2**31 - 1)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 10**30])
def test_what_does_not_fit_is_refused(value: int) -> None:
    with pytest.raises(OverflowError):
        pack([1, value])


def test_four_bytes_a_number_on_the_wire() -> None:
    data = bytes(to_wire(pack([1, -2])))
    assert data == b"\1\0\0\0\xfe\xff\xff\xff"
    assert from_wire(array, data) == array("i", [1, -2])
    with pytest.raises(NotImplementedError):
        to_wire({1})
    with pytest.raises(TypeError):
        from_wire(set, [1])


def test_a_list_is_taken_too() -> None:
    assert messages.decode(wire([1, 2]), EngineRequest).prompt_token_ids == array("i", [1, 2])


@pytest.mark.parametrize("prompt", [b"abc", "ab", 5, None, [1.5], ["a"], [2**31], [[1]], {"a": 1}])
def test_anything_else_is_refused(prompt: object) -> None:
    with pytest.raises(msgspec.ValidationError, match="prompt_token_ids"):
        messages.decode(wire(prompt), EngineRequest)
