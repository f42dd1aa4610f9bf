"""Operations: state, metrics, live requests, keys, the API's description."""

import asyncio
import re

import httpx
import pytest

from lightllm.api.app import create_app
from lightllm.api.routes import ENDPOINTS
from tests.api.harness import Asgi, run_asgi

KEY = {"security": {"api_key": ("sesame", "other")}}


def test_state_routes() -> None:
    async def test(app: Asgi) -> None:
        for path in ("/health", "/healthz"):
            reply = await app.client.get(path)
            assert (reply.status_code, reply.json()) == (200, {"message": "Ok"})
        assert (await app.client.head("/health")).status_code == 200
        for method in ("GET", "POST"):
            assert (await app.client.request(method, "/liveness")).json() == {"status": "ok"}
            assert (await app.client.request(method, "/readiness")).json() == {"status": "ok"}
            assert (await app.client.request(method, "/get_model_name")).json() == {"model_name": "tiny"}
        load = (await app.client.get("/token_load")).json()
        assert load == {"current_load": 0.0, "logical_max_load": 0.0, "dynamic_max_load": 0.0}
        app.engine.fault = "engine: no answer for 9 s"
        reply = await app.client.get("/health")
        assert (reply.status_code, reply.json()["message"]) == (503, "engine: no answer for 9 s")
        app.context.is_draining = True
        assert (await app.client.get("/readiness")).json()["error"]["code"] == "draining"
        assert (await app.client.get("/liveness")).status_code == 200

    run_asgi(test)


def test_metrics_have_the_published_names_and_count() -> None:
    async def test(app: Asgi) -> None:
        await app.post("/generate", {"inputs": "hi", "parameters": {"max_new_tokens": 3, "n": 2}})
        await app.post("/generate", {"inputs": ""})
        reply = await app.client.get("/metrics")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = reply.text.splitlines()
        for line in [
            "# TYPE lightllm_request_count counter",
            'lightllm_request_count{model="tiny",route="/generate"} 2',
            'lightllm_request_success{model="tiny"} 1',
            'lightllm_request_failure{model="tiny",status="400",code="out_of_range"} 1',
            'lightllm_request_finish{model="tiny",reason="length"} 2',
            'lightllm_prompt_tokens_total{model="tiny"} 2',
            'lightllm_generated_tokens_total{model="tiny"} 6',
            'lightllm_cached_tokens_total{model="tiny"} 1',
            'lightllm_engine_restarts_total{model="tiny"} 0',
            'lightllm_kv_total_tokens{model="tiny"} 4096',
            'lightllm_build_info{model="tiny",version="0.0.0"} 1',
            'lightllm_request_first_token_duration_count{model="tiny"} 1',
            'lightllm_request_queue_duration_count{model="tiny"} 1',
            'lightllm_request_duration_count{model="tiny"} 1',
            'lightllm_requests_running{model="tiny"} 0',
            'lightllm_prefix_cache_hit_rate{model="tiny"} 0.5',
            'lightllm_node_up{model="tiny"} 1.0',
            'lightllm_preemptions_total{model="tiny"} 0',
            "# TYPE lightllm_batch_size histogram",
            'lightllm_request_inter_token_duration_count{model="tiny"} 4',
            'lightllm_request_input_length_bucket{model="tiny",le="2.0"} 1',
            'lightllm_request_generated_tokens_sum{model="tiny"} 6.0',
            "# TYPE lightllm_step_duration histogram",
        ]:
            assert line in lines, line
        assert re.search(r"^process_resident_memory_bytes \S+$", reply.text, re.MULTILINE)

    run_asgi(test)


def test_live_requests_are_listed_and_cancelled() -> None:
    async def test(app: Asgi) -> None:
        app.engine.resumed.clear()
        waiting = asyncio.create_task(app.post("/generate", {"inputs": "hi"}, **{"x-request-id": "mine"}))
        while not app.engine.requests:  # noqa: ASYNC110  a poll is enough here
            await asyncio.sleep(0.001)
        listed = (await app.client.get("/debug/requests?state=live")).json()["requests"]
        assert [(r["label"], r["state"], r["prompt_tokens"]) for r in listed] == [("mine", "queued", 2)]
        request_id = listed[0]["id"]
        gone = (await app.client.delete(f"/debug/requests/{request_id}")).json()
        assert (gone["state"], gone["finish_reason"]) == ("done", "abort")
        answer = (await waiting).json()
        assert (answer["generated_text"], answer["finish_reason"]) == ([""], "abort")
        assert app.engine.aborted == [(request_id, "abort")]
        done = (await app.client.get(f"/debug/requests/{request_id}")).json()
        assert done["route"] == "/generate"
        assert [name for name, _ in done["nodes"][0]["events"]] == ["queued", "released"]
        assert "hi" not in str(done.values())
        assert (await app.client.get("/debug/requests/req_unknown")).status_code == 404
        assert (await app.client.get("/debug/requests?limit=-1")).status_code == 400
        assert (await app.client.get("/debug/requests?limit=0")).json() == {"requests": []}

    run_asgi(test)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Basic sesame"}, 401),
        ({"authorization": b"Bearer \xff\xfe"}, 401),
        ({"authorization": "Bearer " + "x" * 20_000}, 401),
        ({"authorization": "Bearer sesame"}, 200),
        ({"authorization": "bearer other"}, 200),
        ({"x-api-key": "sesame"}, 200),
    ],
)
def test_keys(headers: dict[str, str], status: int) -> None:
    async def test(app: Asgi) -> None:
        for path in ("/v1/models", "/metrics", "/get_model_name", "/debug/requests", "/openapi.json"):
            reply = await app.client.get(path, headers=headers)
            assert reply.status_code == status, path
            if status == 401:
                assert reply.json()["error"]["code"] == "invalid_api_key"
                assert reply.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/healthz", "/liveness", "/readiness", "/"):
            assert (await app.client.get(path, headers=headers)).status_code == 200, path
        reply = await app.client.post("/", headers=headers, content=b"not json")
        assert reply.status_code == (401 if status == 401 else 415)

    run_asgi(test, **KEY)


def test_debug_without_a_key_is_for_this_machine() -> None:
    async def test(app: Asgi) -> None:
        transport = httpx.ASGITransport(app=create_app(app.context), client=("10.0.0.9", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as remote:
            assert (await remote.get("/debug/requests")).status_code == 401
            assert (await remote.get("/metrics")).status_code == 200
        assert (await app.client.get("/debug/requests")).status_code == 200

    run_asgi(test)


def test_the_description_lists_what_is_served() -> None:
    async def test(app: Asgi) -> None:
        document = (await app.client.get("/openapi.json")).json()
        served = {(e.path.replace(":path}", "}"), m.lower()) for e in ENDPOINTS for m in e.methods}
        described = {(path, method) for path, item in document["paths"].items() for method in item}
        assert described == served | {("/openapi.json", "get")}
        schema = document["components"]["schemas"]["NativeRequest"]
        assert schema["required"] == ["inputs"]
        names = re.findall(r"#/components/schemas/(\w+)", str(document))
        assert set(names) <= set(document["components"]["schemas"])

    run_asgi(test)


def test_one_log_line_per_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lightllm.request")

    async def test(app: Asgi) -> None:
        body = {"inputs": "secret", "parameters": {"max_new_tokens": 2}}
        await app.post("/generate", body, **{"x-request-id": "mine"})
        await app.post("/v1/completions", {"prompt": ""})
        await app.client.get("/health")

    run_asgi(test)
    lines = [record.getMessage() for record in caplog.records if record.name == "lightllm.request"]
    assert len(lines) == 2
    assert re.fullmatch(
        r"req_\w{32} /generate status=200 label=mine finish=length prompt=6 cached=1 output=2 "
        r"queue_ms=\S+ ttft_ms=\S+ total_ms=\S+",
        lines[0],
    )
    assert "status=400 code=out_of_range" in lines[1]
