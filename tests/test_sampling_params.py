"""SamplingParams.validate: every limit of every field, on both sides of the limit."""

import math

import pytest

from lightllm.errors import InvalidSamplingParams
from lightllm.sampling_params import SamplingParams, validate

VOCAB_SIZE = 100

ACCEPTED = [
    {},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2**31 - 1},
    {"max_new_tokens": 4, "min_new_tokens": 4},
    {"min_new_tokens": 0},
    {"temperature": 0},
    {"temperature": 100.0},
    {"top_p": 0.0},
    {"top_p": 1},
    {"top_k": -1},
    {"top_k": 0},
    {"top_k": 2**31 - 1},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"presence_penalty": -100.0, "frequency_penalty": 100.0},
    {"repetition_penalty": 100.0},
    {"repetition_penalty": 1e-6},
    {"exponential_decay_length_penalty": (0, 1.0)},
    {"logit_bias": {0: -100.0, 99: 100.0}},
    {"logit_bias": dict.fromkeys(range(100), 1.0)},
    {"allowed_token_ids": list(range(100))},
    {"stop_sequences": ["x" * 1024, [99] * 256]},
    {"stop_sequences": ["a"] * 16},
    {"stop_token_ids": [0] * 64},
    {"n": 16},
    {"logprobs": 0, "prompt_logprobs": 20},
    {"regular_constraint": "a" * (256 * 1024)},
]

REFUSED = [
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("max_new_tokens", 2**31),
    ("min_new_tokens", -1),
    ("min_new_tokens", 17),
    ("temperature", -0.1),
    ("temperature", 100.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", -0.1),
    ("top_p", 1.5),
    ("top_p", math.nan),
    ("top_k", -2),
    ("top_k", 2**31),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("seed", -(2**63) - 1),
    ("seed", 2**64),
    ("presence_penalty", 100.1),
    ("frequency_penalty", -100.1),
    ("frequency_penalty", math.nan),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 100.1),
    ("repetition_penalty", math.nan),
    ("exponential_decay_length_penalty", (-1, 1.0)),
    ("exponential_decay_length_penalty", (1, 0.9)),
    ("exponential_decay_length_penalty", (1, math.inf)),
    ("logit_bias", {-1: 0.0}),
    ("logit_bias", {100: 0.0}),
    ("logit_bias", {1: 100.1}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    ("allowed_token_ids", [100]),
    ("allowed_token_ids", [0] * 101),
    ("stop_sequences", ["a"] * 17),
    ("stop_sequences", [""]),
    ("stop_sequences", ["x" * 1025]),
    ("stop_sequences", [[]]),
    ("stop_sequences", [[1] * 257]),
    ("stop_sequences", [[100]]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [0] * 65),
    ("n", 0),
    ("n", 10**6),
    ("logprobs", -1),
    ("logprobs", 21),
    ("prompt_logprobs", 21),
    ("guided_json", "a" * (256 * 1024 + 1)),
]


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_accepts(fields: dict[str, object]) -> None:
    params = SamplingParams(**fields)
    assert validate(params, vocab_size=VOCAB_SIZE) is None


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda value: str(value)[:40])
def test_refuses(name: str, value: object) -> None:
    with pytest.raises(InvalidSamplingParams) as caught:
        validate(SamplingParams(**{name: value}), vocab_size=VOCAB_SIZE, prefix="parameters.")
    error = caught.value
    assert error.param == f"parameters.{name}"
    assert error.code == "out_of_range"
    assert error.message.startswith(f"parameters.{name}: got ")
    assert ", allowed " in error.message
    assert len(error.message) < 200


def test_message_names_field_value_and_range() -> None:
    with pytest.raises(InvalidSamplingParams) as caught:
        validate(SamplingParams(top_p=1.5), vocab_size=VOCAB_SIZE, prefix="parameters.")
    assert caught.value.message == "parameters.top_p: got 1.5, allowed 0 <= top_p <= 1"


def test_only_one_constraint() -> None:
    with pytest.raises(InvalidSamplingParams, match="one constraint per request") as caught:
        validate(SamplingParams(regular_constraint="a", guided_json="{}"), vocab_size=VOCAB_SIZE)
    assert caught.value.param == "regular_constraint/guided_json"


def test_constraint_excludes_allowed_ids() -> None:
    with pytest.raises(InvalidSamplingParams, match="not together with guided_json"):
        validate(SamplingParams(guided_json="{}", allowed_token_ids=[1]), vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(
    ("fields", "is_greedy"),
    [
        ({}, True),
        ({"do_sample": True}, False),
        ({"do_sample": True, "temperature": 0}, True),
        ({"do_sample": True, "temperature": 1e-8}, True),
        ({"do_sample": True, "temperature": 1e-5}, False),
        ({"do_sample": False, "temperature": 2.0}, True),
    ],
)
def test_greedy(fields: dict[str, object], is_greedy: bool) -> None:
    assert SamplingParams(**fields).is_greedy is is_greedy


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_has_penalties(name: str) -> None:
    assert SamplingParams(**{name: 0.5}).has_penalties
    assert not SamplingParams().has_penalties


def test_defaults_are_not_shared() -> None:
    assert SamplingParams().stop_sequences is not SamplingParams().stop_sequences
