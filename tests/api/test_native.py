"""The native API, byte by byte."""

import pytest

from lightllm.api.fields import sampling_defaults
from lightllm.messages import RequestFailure
from tests.api.harness import Asgi, run_asgi


def frame(token_id: object, text: str, count: int, end: str = "", special: str = "false") -> str:
    logprob = "null" if token_id == "null" else "-0.5"
    tail = end or '"finished":false,"finish_reason":null,"details":null'
    return (
        f'data:{{"token":{{"id":{token_id},"text":"{text}","logprob":{logprob},"special":{special},'
        f'"count_output_tokens":{count},"prompt_tokens":2}},"generated_text":null,{tail}}}\n\n'
    )


STOP = '"finished":true,"finish_reason":"stop","details":null'


def test_generate_answers_in_the_published_shape() -> None:
    async def test(app: Asgi) -> None:
        reply = await app.post("/generate", {"inputs": "hi", "parameters": {"max_new_tokens": 5}})
        assert reply.content == (
            b'{"generated_text":["hello"],"count_output_tokens":5,"finish_reason":"length","prompt_tokens":2}'
        )
        assert reply.headers["content-type"] == "application/json"
        reply = await app.post("/generate", {"inputs": [1, 2], "parameters": {"n": 2, "max_new_tokens": 2}})
        assert reply.content == (
            b'{"generated_text":["he","he"],"count_output_tokens":[2,2],'
            b'"finish_reason":["length","length"],"prompt_tokens":2}'
        )

    run_asgi(test)


def test_details_name_every_token() -> None:
    async def test(app: Asgi) -> None:
        parameters = {"max_new_tokens": 2, "return_details": True}
        reply = await app.post("/generate", {"inputs": "hi", "parameters": parameters})
        assert reply.json()["tokens"][1] == {
            "id": 101,
            "logprob": -0.5,
            "cumlogprob": -0.5,
            "special": False,
            "count_output_tokens": 2,
            "prompt_cache_len": 1,
            "mtp_accepted_token_num": 0,
            "prompt_tokens": 2,
            "text": "e",
        }
        assert app.engine.requests[0].sampling_params.logprobs == 0

    run_asgi(test)


def test_stream_frames() -> None:
    async def test(app: Asgi) -> None:
        reply = await app.post("/generate_stream", {"inputs": "hi", "parameters": {"max_new_tokens": 9}})
        assert reply.headers["content-type"] == "text/event-stream"
        assert reply.headers["cache-control"] == "no-cache"
        assert reply.text == "".join(
            [
                frame(104, "h", 1),
                frame(228, "", 2),
                frame(189, "", 3),
                frame(160, "\u4f60", 4),
                frame(34, '\\"', 5),
                frame(256, "", 6, STOP, "true"),
            ]
        )

    run_asgi(test, reply=[*b"h", *"\u4f60".encode(), *b'"'])


def test_stop_strings_are_held_back_and_stripped() -> None:
    async def test(app: Asgi) -> None:
        body = {"inputs": "hi", "parameters": {"max_new_tokens": 9, "stop": ["lo", "xx"]}}
        reply = await app.post("/generate_stream", body)
        assert reply.text == "".join(
            [
                frame(104, "h", 1),
                frame(101, "e", 2),
                frame(108, "", 3),
                frame(108, "l", 4),
                frame(111, "", 5, STOP),
            ]
        )
        whole = await app.post("/generate", body)
        assert whole.json()["generated_text"] == ["hel"]
        assert whole.json()["finish_reason"] == "stop"
        body["parameters"]["include_stop_str_in_output"] = True
        assert (await app.post("/generate", body)).json()["generated_text"] == ["hello"]

    run_asgi(test)


def test_a_failure_in_mid_stream_is_the_last_frame() -> None:
    async def test(app: Asgi) -> None:
        app.engine.failures, app.engine.fail_after = [RequestFailure(code="node_lost", message="gone")], 1
        reply = await app.post("/generate_stream", {"inputs": "hi"})
        assert reply.status_code == 200
        end = (
            '"finished":true,"finish_reason":"error","details":null,"error":{"message":"gone",'
            '"type":"server_error","param":null,"code":"node_lost"},"message":"gone"'
        )
        assert reply.text == frame(104, "h", 1) + frame("null", "", 1, end)

    run_asgi(test)


def test_root_picks_by_stream() -> None:
    async def test(app: Asgi) -> None:
        body = {"inputs": "hi", "parameters": {"max_new_tokens": 1}}
        assert (await app.post("/", {**body, "stream": False})).json()["generated_text"] == ["h"]
        assert (await app.post("/", body)).json()["generated_text"] == ["h"]
        assert (await app.post("/", {**body, "stream": True})).text.startswith("data:{")

    run_asgi(test)


@pytest.mark.parametrize("parameters", [{"n": 2}, {"best_of": 2}])
def test_streams_have_one_sample(parameters: dict[str, int]) -> None:
    async def test(app: Asgi) -> None:
        reply = await app.post("/generate_stream", {"inputs": "hi", "parameters": parameters})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "parameters.n")

    run_asgi(test)


def test_the_models_defaults_stand_behind_the_clients_fields() -> None:
    async def test(app: Asgi) -> None:
        app.context.sampling_defaults = {"do_sample": True, "temperature": 0.6}
        await app.post("/generate", {"inputs": "hi", "parameters": {"temperature": None, "top_p": 0.5}})
        params = app.engine.requests[0].sampling_params
        assert (params.do_sample, params.temperature, params.top_p) == (True, 0.6, 0.5)

    run_asgi(test)


def test_unusable_model_defaults_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    config = {
        "temperature": 0.6,
        "top_p": 1.5,
        "top_k": True,
        "do_sample": 1,
        "presence_penalty": 0.5,
        "eos": 1,
    }
    assert sampling_defaults({**config, "repetition_penalty": None}) == {
        "temperature": 0.6,
        "presence_penalty": 0.5,
    }
    assert [name in caplog.text for name in ("top_p", "top_k", "do_sample")] == [True] * 3


def test_openai_clients_get_samples_whatever_the_model_says() -> None:
    async def test(app: Asgi) -> None:
        app.context.sampling_defaults = {"do_sample": False, "temperature": 0.6}
        await app.post("/v1/completions", {"prompt": "hi"})
        await app.post("/v1/completions", {"prompt": "hi", "do_sample": False})
        first, second = (request.sampling_params for request in app.engine.requests)
        assert (first.do_sample, first.temperature, second.do_sample) == (True, 0.6, False)

    run_asgi(test)


def test_request_timeout_bounds_whoever_names_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.frontend.generation.DEADLINE_GRACE_S", 0.02)
    monkeypatch.setattr("lightllm.frontend.generation.FIRST_OUTPUT_LIMIT_S", 0.02)

    async def test(app: Asgi) -> None:
        app.engine.resumed.clear()
        whole = await app.post("/generate", {"inputs": "hi"})
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline")
        streamed = await app.post("/generate_stream", {"inputs": "hi"})
        assert streamed.status_code == 200  # held back for the first token, but not for longer than its limit
        assert '"finish_reason":"error"' in streamed.text
        assert '"code":"deadline"' in streamed.text
        assert streamed.text.count("data:") == 1

    run_asgi(test, server={"request_timeout": 0.1})


def test_request_ids_priority_and_deadline_reach_the_engine() -> None:
    async def test(app: Asgi) -> None:
        body = {"inputs": "hi", "timeout_s": 5, "parameters": {"priority": 3}}
        reply = await app.post("/generate", body)
        sent = app.engine.requests[0]
        assert sent.request_id == reply.headers["x-request-id"]
        assert (sent.priority, list(sent.prompt_token_ids)) == (3, [104, 105])
        assert sent.deadline_s == pytest.approx(sent.arrival_s + 5, abs=0.5)
        reply = await app.post("/generate", body, **{"x-request-id": "mine-1"})
        assert reply.headers["x-request-id"] == "mine-1"
        assert app.engine.requests[1].request_id.startswith("req_")
        reply = await app.post("/generate", body, **{"x-request-id": "x" * 129})
        assert reply.headers["x-request-id"].startswith("req_")

    run_asgi(test)
