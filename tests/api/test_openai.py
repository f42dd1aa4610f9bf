"""The OpenAI API: shapes, choices, logprobs, chunks, names."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from lightllm.messages import RequestFailure
from tests.api.harness import Asgi, run_asgi

USER = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


def chunks(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.headers["content-type"] == "text/event-stream"
    frames = reply.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: ") for frame in frames[:-1])
    return [json.loads(frame[6:]) for frame in frames[:-2]]


def test_completion_shape() -> None:
    async def test(app: Asgi) -> None:
        answer = (await app.post("/v1/completions", {"prompt": "hi", "max_tokens": 3})).json()
        assert answer.pop("created") > 1e9
        assert answer.pop("id").startswith("cmpl-")
        assert answer == {
            "object": "text_completion",
            "model": "tiny",
            "system_fingerprint": "lightllm-0.0.0",
            "choices": [{"index": 0, "text": "hel", "logprobs": None, "finish_reason": "length"}],
            "usage": {
                "prompt_tokens": 2,
                "completion_tokens": 3,
                "total_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 1},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        }
        params = app.engine.requests[0].sampling_params
        assert (params.do_sample, params.min_new_tokens, params.max_new_tokens) == (True, 0, 3)

    run_asgi(test)


@pytest.mark.parametrize(
    ("prompt", "count", "tokens"),
    [("ab", 1, 2), (["ab", "c"], 2, 3), ([1, 2, 3], 1, 3), ([[1], [2, 3]], 2, 3)],
)
def test_prompt_forms_and_choice_order(prompt: Any, count: int, tokens: int) -> None:
    async def test(app: Asgi) -> None:
        body = {"prompt": prompt, "n": 2, "max_tokens": 1}
        answer = (await app.post("/v1/completions", body)).json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * count))
        assert answer["usage"]["prompt_tokens"] == tokens
        assert answer["usage"]["completion_tokens"] == 2 * count
        streamed = chunks(await app.post("/v1/completions", {**body, "stream": True}))
        ends = [c["choices"][0]["index"] for c in streamed if c["choices"][0]["finish_reason"]]
        assert sorted(ends) == list(range(2 * count))

    run_asgi(test)


def test_completion_logprobs_and_echo() -> None:
    async def test(app: Asgi) -> None:
        body = {"prompt": "ab", "max_tokens": 2, "echo": True, "logprobs": 2}
        choice = (await app.post("/v1/completions", body)).json()["choices"][0]
        assert choice["text"] == "abhe"
        assert choice["logprobs"] == {
            "tokens": ["a", "b", "h", "e"],
            "token_logprobs": [None, -0.5, -0.5, -0.5],
            "top_logprobs": [
                None,
                {"h": -0.5, "A": -1.5, "b": -0.5},
                {"h": -0.5, "A": -1.5},
                {"e": -0.5, "A": -1.5},
            ],
            "text_offset": [0, 1, 2, 3],
        }
        streamed = chunks(await app.post("/v1/completions", {**body, "stream": True}))
        parts = [c["choices"][0] for c in streamed]
        assert "".join(part["text"] for part in parts) == "abhe"
        columns = [part["logprobs"] for part in parts if part["logprobs"] is not None]
        for name, values in choice["logprobs"].items():
            assert [value for column in columns for value in column[name]] == values

    run_asgi(test)


@pytest.mark.parametrize(
    ("prompt", "text", "offsets"),
    [
        ("<eos>ab", "<eos>abh", [0, 5, 6, 7]),
        ([256, 97, 98], "abh", [0, 0, 1, 2]),
        ("\u4f60", "\u4f60h", [0, 0, 0, 1]),
    ],
)
def test_offsets_point_into_the_echoed_text(prompt: Any, text: str, offsets: list[int]) -> None:
    async def test(app: Asgi) -> None:
        body = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 0}
        choice = (await app.post("/v1/completions", body)).json()["choices"][0]
        assert (choice["text"], choice["logprobs"]["text_offset"]) == (text, offsets)

    run_asgi(test)


def test_scoring_a_prompt() -> None:
    async def test(app: Asgi) -> None:
        body = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 0}
        answer = (await app.post("/v1/completions", body)).json()
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
        assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
        assert choice["logprobs"]["top_logprobs"] == [None, {}, {}]
        assert answer["usage"]["completion_tokens"] == 0

    run_asgi(test)


def test_completion_chunks() -> None:
    async def test(app: Asgi) -> None:
        body = {"prompt": "hi", "stream": True, "max_tokens": 2, "stream_options": {"include_usage": True}}
        got = chunks(await app.post("/v1/completions", body))
        assert len({(c["id"], c["created"], c["model"], c["object"]) for c in got}) == 1
        assert [c["choices"] for c in got] == [
            [{"index": 0, "text": "h", "logprobs": None, "finish_reason": None}],
            [{"index": 0, "text": "e", "logprobs": None, "finish_reason": None}],
            [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}],
            [],
        ]
        assert [c["usage"] for c in got[:-1]] == [None] * 3
        assert got[-1]["usage"]["total_tokens"] == 4
        plain = chunks(await app.post("/v1/completions", {"prompt": "hi", "stream": True}))
        assert all("usage" not in c for c in plain)

    run_asgi(test)


def test_chat_shape_and_context_left() -> None:
    async def test(app: Asgi) -> None:
        answer = (await app.post(CHAT, {"messages": USER, "user": "u", "store": True})).json()
        assert answer["id"].startswith("chatcmpl-")
        assert answer["object"] == "chat.completion"
        message = {"role": "assistant", "content": "hello"}
        assert answer["choices"] == [
            {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        ]
        sent = app.engine.requests[0]
        assert bytes(list(sent.prompt_token_ids)) == b"<user>hi\n<assistant>"
        assert sent.sampling_params.max_new_tokens == 256 - len(sent.prompt_token_ids)

    run_asgi(test)


def test_chat_history_goes_through_the_template() -> None:
    async def test(app: Asgi) -> None:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        messages = [
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "r"},
        ]
        reply = await app.post(CHAT, {"messages": messages, "max_tokens": 1})
        assert reply.status_code == 200
        text = bytes(list(app.engine.requests[0].prompt_token_ids))
        assert text == b"<system>d\n<user>a\nb\n<assistant>\n<tool>r\n<assistant>"
        kwargs = {"continue_final_message": True}
        messages = [*USER, {"role": "assistant", "content": "well"}]
        body = {"messages": messages, "chat_template_kwargs": kwargs, "max_tokens": 1}
        assert (await app.post(CHAT, body)).status_code == 200
        assert bytes(list(app.engine.requests[1].prompt_token_ids)) == b"<user>hi\n<assistant>well"

    run_asgi(test)


def test_chat_logprobs() -> None:
    async def test(app: Asgi) -> None:
        body = {"messages": USER, "max_tokens": 1, "logprobs": True, "top_logprobs": 2}
        choice = (await app.post(CHAT, body)).json()["choices"][0]
        top = [
            {"token": "h", "logprob": -0.5, "bytes": [104]},
            {"token": "A", "logprob": -1.5, "bytes": [65]},
        ]
        entry = {"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": top}
        assert choice["logprobs"] == {"content": [entry]}
        streamed = chunks(await app.post(CHAT, {**body, "stream": True}))
        assert streamed[1]["choices"][0]["logprobs"] == {"content": [entry]}

    run_asgi(test)


def test_chat_chunks() -> None:
    async def test(app: Asgi) -> None:
        got = chunks(await app.post(CHAT, {"messages": USER, "stream": True, "n": 2, "max_tokens": 2}))
        for index in range(2):
            mine = [c["choices"][0] for c in got if c["choices"][0]["index"] == index]
            assert [(part["delta"], part["finish_reason"]) for part in mine] == [
                ({"role": "assistant", "content": ""}, None),
                ({"content": "h"}, None),
                ({"content": "e"}, None),
                ({}, "length"),
            ]
        assert {c["object"] for c in got} == {"chat.completion.chunk"}

    run_asgi(test)


@pytest.mark.parametrize(("path", "end"), [("/v1/completions", {"text": ""}), (CHAT, {"delta": {}})])
def test_an_error_chunk_is_last_and_has_no_done(path: str, end: dict[str, Any]) -> None:
    async def test(app: Asgi) -> None:
        app.engine.fail_after = 2
        app.engine.failures = [RequestFailure(code="engine_down", message="died")]
        reply = await app.post(path, {"prompt": "hi", "messages": USER, "stream": True, "n": 2})
        assert reply.status_code == 200
        frames = reply.text.split("\n\n")
        assert "[DONE]" not in reply.text
        last = json.loads(frames[-2][6:])
        assert last["choices"] == [{"index": 0, **end, "finish_reason": "error"}]
        assert (last["error"]["code"], last["message"]) == ("engine_down", "died")
        assert sum('"error":{' in frame for frame in frames) == 1

    run_asgi(test)


def test_pings_fill_long_silences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.api.call.PING_S", 0.02)
    monkeypatch.setattr("lightllm.frontend.generation.FIRST_OUTPUT_LIMIT_S", 0.0)

    async def test(app: Asgi) -> None:
        app.engine.resumed.clear()
        body = json.dumps({"prompt": "hi", "stream": True, "max_tokens": 1}).encode()
        asyncio.get_running_loop().call_later(0.1, app.engine.resumed.set)
        seen = (await app.post("/v1/completions", body)).text
        assert seen.startswith(": ping\n\n: ping\n\n")
        assert seen.endswith("data: [DONE]\n\n")
        native = (await app.post("/generate_stream", {"inputs": "hi"})).text
        assert "ping" not in native

    run_asgi(test)


def test_a_ping_comes_one_interval_after_the_last_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.api.call.PING_S", 0.2)

    async def test(app: Asgi) -> None:
        loop = asyncio.get_running_loop()
        app.engine.pauses = {1: 0.15, 2: 0.3}  # no ping for the first, one for the second
        began = loop.time()
        body = json.dumps({"prompt": "hi", "stream": True, "max_tokens": 3}).encode()
        seen = (await app.post("/v1/completions", body)).text
        assert loop.time() - began < 2
        assert seen.count(": ping") == 1
        assert seen.index('"text":"e"') < seen.index(": ping") < seen.index('"text":"l"')

    run_asgi(test)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (None, "tiny"),
        ("", "tiny"),
        ("default_model_name", "tiny"),
        ("alias", "alias"),
        ("/data/models/tiny", "tiny"),
        ("/data/models/alias/", "alias"),
        ("smollm2-135m", "tiny"),
    ],
)
def test_model_names(name: str | None, shown: str) -> None:
    async def test(app: Asgi) -> None:
        reply = await app.post("/v1/completions", {"prompt": "a", "model": name, "max_tokens": 1})
        assert reply.json()["model"] == shown

    run_asgi(test)


def test_unknown_models_are_told_the_names() -> None:
    async def test(app: Asgi) -> None:
        for path in ("/v1/completions", CHAT, "/tokenize", "/detokenize"):
            body = {
                "model": "gpt-4",
                "prompt": "a",
                "tokens": [1],
                **({"messages": USER} if path == CHAT else {}),
            }
            reply = await app.post(path, body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
            assert "tiny, alias" in reply.json()["message"]

    run_asgi(test)


def test_tokens_there_and_back() -> None:
    async def test(app: Asgi) -> None:
        reply = await app.post("/tokenize", {"prompt": "a<eos>", "return_token_strs": True})
        assert reply.json() == {
            "tokens": [97, 256],
            "count": 2,
            "max_model_len": 256,
            "token_strs": ["a", "<eos>"],
        }
        assert (await app.post("/detokenize", {"tokens": [97, 256]})).json() == {"prompt": "a<eos>"}
        assert (await app.post("/tokenize", {"messages": USER})).json()["count"] == 20
        assert (await app.post("/tokens", {"text": "abc"})).json() == {"ntokens": 3}
        assert (await app.client.get("/tokens?text=ab")).json() == {"ntokens": 2}
        body = json.dumps({"text": "abcd", "parameters": {"add_special_tokens": False}})
        headers = {"content-type": "application/json"}
        reply = await app.client.request("GET", "/tokens", content=body, headers=headers)
        assert reply.json() == {"ntokens": 4}

    run_asgi(test)
