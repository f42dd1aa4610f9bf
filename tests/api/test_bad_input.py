"""The error table: what clients may get wrong, and the exact status, code and field that they are told."""

import json
import time
from typing import Any

import pytest

from lightllm.messages import RequestFailure
from tests.api.harness import Asgi, run_asgi

GENERATE = "/generate"
COMPLETE = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


def native(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "hi", "parameters": parameters}


def complete(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hi", "max_tokens": 2, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": USER, "max_tokens": 2, **fields}


def function(name: str, arguments: str = "{}") -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


RANGE, TYPE, MISSING, REFUSED = "out_of_range", "wrong_type", "missing_field", "not_supported"
LENGTH, BAD = "context_length_exceeded", "bad_json"

NATIVE = [
    # max tokens
    (native(max_new_tokens=0), RANGE, "parameters.max_new_tokens"),
    (native(max_new_tokens=-1), RANGE, "parameters.max_new_tokens"),
    (native(max_new_tokens=2**31), RANGE, "parameters.max_new_tokens"),
    (native(max_new_tokens=2**63), RANGE, "parameters.max_new_tokens"),
    (native(max_new_tokens=1.5), TYPE, "parameters.max_new_tokens"),
    (native(max_new_tokens="10"), TYPE, "parameters.max_new_tokens"),
    (native(max_new_tokens=True), TYPE, "parameters.max_new_tokens"),
    (native(max_new_tokens=255), LENGTH, "inputs"),
    (native(max_new_tokens=2, min_new_tokens=3), RANGE, "parameters.min_new_tokens"),
    (native(min_new_tokens=0), RANGE, "parameters.min_new_tokens"),
    ({"inputs": "hi", "parameters": []}, TYPE, "parameters"),
    ({"inputs": ["a", "b"]}, TYPE, "inputs[0]"),
    # prompt
    ({}, MISSING, "inputs"),
    ({"inputs": None}, TYPE, "inputs"),
    ({"inputs": ""}, RANGE, "inputs"),
    ({"inputs": []}, RANGE, "inputs"),
    ({"inputs": [[]]}, TYPE, "inputs[0]"),
    ({"inputs": [257]}, RANGE, "inputs"),
    ({"inputs": [-1]}, RANGE, "inputs"),
    ({"inputs": [2**40]}, RANGE, "inputs"),
    ({"inputs": [1, "a"]}, TYPE, "inputs[1]"),
    ({"inputs": [1, True]}, TYPE, "inputs[1]"),
    ({"inputs": [1.0]}, TYPE, "inputs[0]"),
    ({"inputs": "x" * 241}, LENGTH, "inputs"),
    ({"inputs": "hi", "multimodal_params": {"images": [{"type": "url"}]}}, REFUSED, "multimodal_params"),
    # sampling
    (native(temperature=-1), RANGE, "parameters.temperature"),
    (native(temperature=1e9), RANGE, "parameters.temperature"),
    (native(temperature="hot"), TYPE, "parameters.temperature"),
    (native(top_p=1.1), RANGE, "parameters.top_p"),
    (native(top_k=-2), RANGE, "parameters.top_k"),
    (native(top_k=2**31), RANGE, "parameters.top_k"),
    (native(min_p=-0.1), RANGE, "parameters.min_p"),
    (native(min_p=1.1), RANGE, "parameters.min_p"),
    (native(temperature=101), RANGE, "parameters.temperature"),
    (native(repetition_penalty=101), RANGE, "parameters.repetition_penalty"),
    (native(presence_penalty=1e308), RANGE, "parameters.presence_penalty"),
    (native(n=17), RANGE, "parameters.n"),
    (native(frequency_penalty=101), RANGE, "parameters.frequency_penalty"),
    (native(presence_penalty=-101), RANGE, "parameters.presence_penalty"),
    (native(repetition_penalty=0), RANGE, "parameters.repetition_penalty"),
    (native(seed=2**63), RANGE, "parameters.seed"),
    (native(seed=2**64), RANGE, "parameters.seed"),
    (native(seed=1.0), TYPE, "parameters.seed"),
    (native(do_sample=1), TYPE, "parameters.do_sample"),
    (native(n=0), RANGE, "parameters.n"),
    (native(n=-1), RANGE, "parameters.n"),
    (native(n=10**6), RANGE, "parameters.n"),
    (native(n=2, best_of=1), RANGE, "parameters.best_of"),
    (native(exponential_decay_length_penalty=[1, 0.5]), RANGE, "parameters.exponential_decay_length_penalty"),
    (
        native(exponential_decay_length_penalty=[-1, 1.5]),
        RANGE,
        "parameters.exponential_decay_length_penalty",
    ),
    (native(exponential_decay_length_penalty=[1]), TYPE, "parameters.exponential_decay_length_penalty"),
    # stops
    (native(stop_sequences=""), RANGE, "parameters.stop_sequences"),
    (native(stop_sequences=[""]), RANGE, "parameters.stop_sequences"),
    (native(stop_sequences=["x"] * 1000), RANGE, "parameters.stop_sequences"),
    (native(stop_sequences=["x" * 1_000_000]), RANGE, "parameters.stop_sequences"),
    (native(stop_sequences=[[]]), RANGE, "parameters.stop_sequences"),
    (native(stop_sequences=[[257]]), RANGE, "parameters.stop_sequences"),
    (native(stop_sequences=["a", [1]]), TYPE, "parameters.stop_sequences"),
    (native(stop_sequences="a", stop="b"), RANGE, "parameters.stop"),
    (native(stop_token_ids=[257]), RANGE, "parameters.stop_token_ids"),
    (native(stop_token_ids=[1] * 65), RANGE, "parameters.stop_token_ids"),
    # bias
    (native(logit_bias={"257": 1}), RANGE, "parameters.logit_bias"),
    (native(logit_bias={"x": 1}), TYPE, "parameters.logit_bias"),
    (native(logit_bias={"1": 101}), RANGE, "parameters.logit_bias"),
    (native(logit_bias={"1": "inf"}), TYPE, "parameters.logit_bias"),
    (native(logit_bias={"1": 1e308}), RANGE, "parameters.logit_bias"),
    (native(logit_bias={"-1": 1}), RANGE, "parameters.logit_bias"),
    (native(logit_bias=[1]), TYPE, "parameters.logit_bias"),
    (native(logit_bias={str(i): 1 for i in range(10**5)}), RANGE, "parameters.logit_bias"),
    (native(allowed_token_ids=[-1]), RANGE, "parameters.allowed_token_ids"),
    (native(allowed_token_ids=[1] * 258), RANGE, "parameters.allowed_token_ids"),
    # later, never, and elsewhere
    (native(guided_json={"type": "object"}), REFUSED, "parameters.guided_json"),
    (native(regular_constraint="(a+)+$"), REFUSED, "parameters.regular_constraint"),
    (native(guided_grammar="root ::= root"), REFUSED, "parameters.guided_grammar"),
    (native(group_request_id=1), REFUSED, "parameters.group_request_id"),
    ({"inputs": "hi", "suggested_dp_index": 0}, REFUSED, "suggested_dp_index"),
    (native(timeout_s=0), RANGE, "parameters.timeout_s"),
    (native(timeout_s=1801), RANGE, "parameters.timeout_s"),
    ({**native(timeout_s=1), "timeout_s": 2}, RANGE, "parameters.timeout_s"),
    (native(priority=11), RANGE, "parameters.priority"),
    ({"inputs": "hi", "priority": -11}, RANGE, "priority"),
]

OPENAI = [
    (COMPLETE, {}, MISSING, "prompt"),
    (COMPLETE, complete(prompt=None), TYPE, "prompt"),
    (COMPLETE, complete(prompt=""), RANGE, "prompt"),
    (COMPLETE, complete(prompt=[]), RANGE, "prompt"),
    (COMPLETE, complete(prompt=[[]]), RANGE, "prompt"),
    (COMPLETE, complete(prompt=["a", ""]), RANGE, "prompt[1]"),
    (COMPLETE, complete(prompt=["a", [1]]), TYPE, "prompt[1]"),
    (COMPLETE, complete(prompt=[[1], [True]]), TYPE, "prompt[1][0]"),
    (COMPLETE, complete(prompt=[1, "a"]), TYPE, "prompt[1]"),
    (COMPLETE, complete(prompt=["a"] * 129), RANGE, "prompt"),
    (COMPLETE, complete(prompt=["a", "x" * 255]), LENGTH, "prompt[1]"),
    (COMPLETE, complete(max_tokens=0), RANGE, "max_tokens"),
    (COMPLETE, complete(max_tokens=-1), RANGE, "max_tokens"),
    (COMPLETE, complete(max_tokens=2**31), RANGE, "max_tokens"),
    (COMPLETE, complete(max_tokens=2**63), RANGE, "max_tokens"),
    (COMPLETE, complete(max_tokens="10"), TYPE, "max_tokens"),
    (COMPLETE, complete(max_tokens=True), TYPE, "max_tokens"),
    (COMPLETE, complete(max_tokens=1.5), TYPE, "max_tokens"),
    (COMPLETE, complete(prompt=[-1]), RANGE, "prompt"),
    (COMPLETE, complete(prompt=[2**40]), RANGE, "prompt"),
    (COMPLETE, complete(prompt=[1.5]), TYPE, "prompt"),
    (COMPLETE, complete(prompt={"a": 1}), TYPE, "prompt"),
    (COMPLETE, complete(n=3, best_of=2), RANGE, "best_of"),
    (COMPLETE, complete(seed=2**64), RANGE, "seed"),
    (COMPLETE, complete(stop=["x"] * 17), RANGE, "stop"),
    (COMPLETE, complete(timeout_s=0), RANGE, "timeout_s"),
    (COMPLETE, complete(priority=11), RANGE, "priority"),
    (COMPLETE, complete(min_tokens=3), RANGE, "min_tokens"),
    (COMPLETE, complete(temperature=2.1), RANGE, "temperature"),
    (COMPLETE, complete(presence_penalty=-2.1), RANGE, "presence_penalty"),
    (COMPLETE, complete(logprobs=21), RANGE, "logprobs"),
    (COMPLETE, complete(logprobs=-1), RANGE, "logprobs"),
    (COMPLETE, complete(logprobs=True), TYPE, "logprobs"),
    (COMPLETE, complete(stop=[""]), RANGE, "stop"),
    (COMPLETE, complete(stop=[[1]]), TYPE, "stop[0]"),
    (COMPLETE, complete(suffix="x"), REFUSED, "suffix"),
    (COMPLETE, complete(suffix=""), REFUSED, "suffix"),
    (COMPLETE, complete(guided_regex="a"), REFUSED, "guided_regex"),
    (COMPLETE, complete(stream_options={"include_usage": 1}), TYPE, "stream_options.include_usage"),
    (CHAT, {}, MISSING, "messages"),
    (CHAT, chat(messages=[]), RANGE, "messages"),
    (CHAT, chat(messages=["x"]), TYPE, "messages[0]"),
    (CHAT, chat(messages=[{"content": "x"}]), MISSING, "messages[0].role"),
    (CHAT, chat(messages=[{"role": "boss", "content": "x"}]), RANGE, "messages[0].role"),
    (CHAT, chat(messages=[{"role": "user"}]), MISSING, "messages[0].content"),
    (CHAT, chat(messages=[{"role": "user", "content": None}]), MISSING, "messages[0].content"),
    (CHAT, chat(messages=[{"role": "user", "content": 5}]), TYPE, "messages[0].content"),
    (
        CHAT,
        chat(
            messages=[
                *USER,
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            ]
        ),
        REFUSED,
        "messages[1].content[1]",
    ),
    (CHAT, chat(messages=[{"role": "tool", "content": "x"}]), MISSING, "messages[0].tool_call_id"),
    (
        CHAT,
        chat(messages=[{"role": "assistant", "content": None, "tool_calls": [{}]}]),
        TYPE,
        "messages[0].tool_calls[0]",
    ),
    (CHAT, chat(messages=USER * 10_001), RANGE, "messages"),
    (CHAT, chat(max_tokens=2, max_completion_tokens=3), RANGE, "max_tokens"),
    (CHAT, chat(max_tokens=0), RANGE, "max_tokens"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 255}]}, LENGTH, "messages"),
    (CHAT, chat(top_logprobs=2), RANGE, "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), RANGE, "top_logprobs"),
    (CHAT, chat(logprobs=1), TYPE, "logprobs"),
    (CHAT, chat(tools=[{"type": "function"}]), REFUSED, "tools"),
    (CHAT, chat(tools=[function("f"), function("f")]), REFUSED, "tools"),
    (CHAT, chat(tools=[function("")]), REFUSED, "tools"),
    (CHAT, chat(tools=[function(f"f{i}") for i in range(1000)]), REFUSED, "tools"),
    (CHAT, chat(tool_choice="required"), REFUSED, "tool_choice"),
    (CHAT, chat(tool_choice=function("unknown")), REFUSED, "tool_choice"),
    (CHAT, chat(response_format={"type": "json_object"}), REFUSED, "response_format"),
    (CHAT, chat(response_format={"schema": {}}), REFUSED, "response_format"),
    (CHAT, chat(response_format=json_schema({"$ref": "#"})), REFUSED, "response_format"),
    (CHAT, chat(response_format=json_schema({"$ref": "http://example.org/x"})), REFUSED, "response_format"),
    (CHAT, chat(response_format=json_schema({"pattern": "(a+)+$"})), REFUSED, "response_format"),
    (CHAT, chat(response_format=json_schema({"odd": 1})), REFUSED, "response_format"),
    (CHAT, chat(response_format=json_schema(False)), REFUSED, "response_format"),
    (CHAT, chat(response_format=json_schema({"title": "x" * 10_000_000})), REFUSED, "response_format"),
    (CHAT, chat(guided_json={}, guided_choice=["a"]), REFUSED, "guided_choice"),
    (CHAT, chat(messages=USER * 10_000), LENGTH, "messages"),
    (
        CHAT,
        chat(messages=[{"role": "assistant", "content": None, "tool_calls": [function("f", "{bad")]}]),
        TYPE,
        "messages[0].tool_calls[0].function.arguments",
    ),
    (CHAT, chat(functions=[]), REFUSED, "functions"),
    (CHAT, chat(audio={}), REFUSED, "audio"),
    (CHAT, chat(modalities=["audio"]), REFUSED, "modalities"),
    (CHAT, chat(reasoning_effort="low"), REFUSED, "reasoning_effort"),
    (CHAT, chat(chat_template_kwargs={"messages": "x"}), REFUSED, "chat_template_kwargs.messages"),
    (CHAT, chat(chat_template_kwargs={"thinking": []}), TYPE, "chat_template_kwargs.thinking"),
    (CHAT, chat(chat_template_kwargs={"thinking": "x" * 65}), RANGE, "chat_template_kwargs.thinking"),
    ("/tokenize", {}, MISSING, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": USER}, MISSING, "prompt"),
    ("/detokenize", {"tokens": [257]}, RANGE, "tokens"),
    ("/detokenize", {"tokens": [-1]}, RANGE, "tokens"),
    ("/tokens", {"text": 1}, TYPE, "text"),
]


async def check_all(app: Asgi, rows: list[tuple[str, Any, str, str]]) -> None:
    for path, body, code, param in rows:
        content = json.dumps(body).encode()
        began = time.monotonic()
        reply = await app.post(path, content)
        shown = content[:200]
        assert time.monotonic() - began < 5, shown  # a second on a machine with nothing else to do
        assert reply.status_code == 400, (path, shown, reply.text)
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == (code, param), (path, shown, error)
        assert error["type"] == "invalid_request_error"
        assert reply.json() == {"error": error, "message": error["message"]}
        assert len(error["message"]) < 400
        assert reply.headers["x-request-id"].startswith("req_")
    assert app.engine.requests == [], "bad input reached the engine"


def test_native_fields() -> None:
    async def test(app: Asgi) -> None:
        for path in (GENERATE, "/generate_stream", "/"):
            rows = [(path, *row) for row in NATIVE]
            await check_all(app, rows)

    run_asgi(test)


def test_openai_fields() -> None:
    run_asgi(lambda app: check_all(app, OPENAI))


def test_streams_get_the_same_errors_before_their_status() -> None:
    rows = [(path, {**body, "stream": True}, *rest) for path, body, *rest in OPENAI if path.startswith("/v1")]
    run_asgi(lambda app: check_all(app, rows))


@pytest.mark.parametrize(
    "body",
    [
        native(max_new_tokens=254),
        native(temperature=0, do_sample=True),
        native(temperature=1e-8, top_p=0, top_k=0),
        native(seed=-1, n=16, max_new_tokens=1),
        native(max_new_tokens=None, stop_sequences=None),
        native(stop=[[104]]),
        native(logit_bias={"5": -100}, allowed_token_ids=[104]),
        {"inputs": "\x00nul", "parameters": None, "multimodal_params": {"images": []}},
        {"inputs": "<eos>"},
        {"inputs": [0] * 240},
        native(exponential_decay_length_penalty=[0, 1e308], logit_bias={"0": -100}),
        native(stop=["h"]),
    ],
)
def test_odd_but_legal(body: dict[str, Any]) -> None:
    async def test(app: Asgi) -> None:
        reply = await app.post(GENERATE, body)
        assert reply.status_code == 200, reply.text

    run_asgi(test)


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'"text"', b"\xff", b'{"inputs":NaN}', b"[" * 10_000])
def test_bodies_that_are_no_object(body: bytes) -> None:
    async def test(app: Asgi) -> None:
        for path in (GENERATE, "/generate_stream", COMPLETE, CHAT, "/tokenize"):
            reply = await app.post(path, body)
            assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")

    run_asgi(test)


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content-type": "text/plain"}, 415, "bad_content_type"),
        ({"content-type": ""}, 415, "bad_content_type"),
        ({"content-type": "application/json; charset=latin-1"}, 415, "bad_content_type"),
        ({"content-encoding": "gzip"}, 415, "bad_content_type"),
        ({"content-type": "Application/JSON ; charset=UTF-8"}, 200, None),
        ({"content-length": "999999999"}, 413, "too_large"),
        ({"content-length": "999999999", "content-type": "text/plain"}, 413, "too_large"),
    ],
)
def test_headers(headers: dict[str, str], status: int, code: str | None) -> None:
    async def test(app: Asgi) -> None:
        reply = await app.post(GENERATE, native(), **headers)
        assert reply.status_code == status
        if code is not None:
            assert reply.json()["error"]["code"] == code

    run_asgi(test)


def test_a_body_over_the_limit() -> None:
    async def test(app: Asgi) -> None:
        async def pieces():
            for _ in range(4):
                yield b" " * 40

        reply = await app.client.post(
            GENERATE, content=pieces(), headers={"content-type": "application/json"}
        )
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")

    run_asgi(test, server={"max_request_bytes": 100})


def test_routes_and_methods() -> None:
    async def test(app: Asgi) -> None:
        for method, path, status, code in [
            ("GET", "/nope", 404, "not_found"),
            ("GET", "/cluster", 404, "wrong_role"),
            ("POST", "/v1/embeddings", 404, "not_implemented"),
            ("GET", "/generate", 405, "method_not_allowed"),
            ("PUT", "/", 405, "method_not_allowed"),
            ("GET", "/v1/models/other", 404, "model_not_found"),
        ]:
            reply = await app.client.request(method, path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), path
            if status == 405:
                assert "POST" in reply.headers["allow"]

    run_asgi(test)


def test_unknown_fields_are_named_in_a_header() -> None:
    async def test(app: Asgi) -> None:
        reply = await app.post(GENERATE, {**native(top_pp=1), "stuff\r\n": 1})
        assert reply.status_code == 200
        assert set(reply.headers["x-ignored-fields"].split(", ")) == {"parameters.top_pp", "stuff??"}

    run_asgi(test)


def test_strict_fields_refuse_them() -> None:
    async def test(app: Asgi) -> None:
        reply = await app.post(GENERATE, native(top_pp=1))
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unknown_field")
        assert reply.json()["message"] == "parameters.top_pp: unknown field; did you mean top_p?"

    run_asgi(test, server={"strict_fields": True})


@pytest.mark.parametrize(
    ("code", "status"), [("queue_full", 429), ("deadline", 504), ("engine_down", 503), ("internal", 500)]
)
@pytest.mark.parametrize("path", [GENERATE, "/generate_stream", COMPLETE, CHAT])
def test_failures_before_the_first_token_have_a_real_status(path: str, code: str, status: int) -> None:
    async def test(app: Asgi) -> None:
        app.engine.failures = [RequestFailure(code=code, message="why")]
        body = {"inputs": "x", "prompt": "x", "messages": USER, "stream": True}
        reply = await app.post(path, body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        assert reply.headers["content-type"] == "application/json"
        assert ("retry-after" in reply.headers) is (status in (429, 503))

    run_asgi(test)


def test_states_in_which_nothing_is_served() -> None:
    async def test(app: Asgi) -> None:
        app.context.is_draining = True
        reply = await app.post(GENERATE, native())
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
        app.context.is_draining, app.engine.info = False, None
        for path in (GENERATE, COMPLETE, CHAT):
            reply = await app.post(path, {"inputs": "x", "prompt": "x", "messages": USER})
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "loading")
            assert reply.headers["retry-after"] == "5"

    run_asgi(test)


def test_our_own_bugs_stay_inside(caplog: pytest.LogCaptureFixture) -> None:
    async def test(app: Asgi) -> None:
        def broken(*args: object, **kwargs: object) -> None:
            raise ZeroDivisionError("secret detail")

        app.context.generator.start = broken
        reply = await app.post(GENERATE, native())
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
        assert "secret" not in reply.text
        assert reply.headers["x-request-id"] in reply.json()["message"]

    run_asgi(test)
    assert "secret detail" in caplog.text
