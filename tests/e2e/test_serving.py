"""The default model behind real processes: the quickstart's requests, streams, batches, prefix cache."""

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import Server, stream_events
from tests.engine.test_smollm2 import PROMPTS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("e2e")]


def test_the_quickstart_curl(smollm2: Server) -> None:
    body = '{\n"inputs": "What is AI?",\n"parameters":{\n"max_new_tokens":17, \n"frequency_penalty":1\n}\n}'
    done = subprocess.run(
        ["curl", "-s", f"{smollm2.url}/generate", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert list(answer) == ["generated_text", "count_output_tokens", "finish_reason", "prompt_tokens"]
    assert answer["count_output_tokens"] == 17
    assert answer["finish_reason"] == "length"
    assert answer["prompt_tokens"] == 4
    assert len(answer["generated_text"]) == 1
    assert "AI" in answer["generated_text"][0] or "intelligence" in answer["generated_text"][0].lower()


def test_the_answer_makes_sense(smollm2: Server) -> None:
    assert "Paris" in smollm2.generate("The capital of France is", max_new_tokens=8)["generated_text"][0]


def test_streamed_and_whole_answers_agree(smollm2: Server) -> None:
    body = {"inputs": PROMPTS[0], "parameters": {"max_new_tokens": 24}}
    whole = smollm2.generate(PROMPTS[0], max_new_tokens=24)
    with smollm2.client.stream("POST", "/generate_stream", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = list(stream_events(reply))
    assert "".join(e["token"]["text"] for e in events) == whole["generated_text"][0]
    assert [e["token"]["count_output_tokens"] for e in events] == list(range(1, len(events) + 1))
    assert [e["finished"] for e in events] == [False] * (len(events) - 1) + [True]
    root = smollm2.client.post("/", json={**body, "stream": False})
    assert root.json() == whole


def test_concurrent_streams_get_what_each_prompt_gets_alone(smollm2: Server) -> None:
    prompts = PROMPTS * 2
    alone = {p: smollm2.generate(p, max_new_tokens=20, ignore_eos=True)["generated_text"] for p in PROMPTS}
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(
            pool.map(
                lambda p: smollm2.generate(p, max_new_tokens=20, ignore_eos=True)["generated_text"], prompts
            )
        )
    assert together == [alone[p] for p in prompts]


def test_seeded_samples_repeat_in_any_company(smollm2: Server) -> None:
    fields = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 12, "ignore_eos": True}
    alone = smollm2.generate(PROMPTS[3], seed=42, n=3, **fields)
    assert len(set(alone["generated_text"])) > 1
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(smollm2.generate, p, **fields) for p in PROMPTS]
        again = smollm2.generate(PROMPTS[3], seed=42, n=3, **fields)
        for other in others:
            other.result()
    assert again == alone


def test_chat_streams_in_the_openai_shape(smollm2: Server) -> None:
    body = {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 20,
        "temperature": 0,
    }
    whole = smollm2.client.post("/v1/chat/completions", json=body).json()
    assert whole["object"] == "chat.completion"
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with smollm2.client.stream("POST", "/v1/chat/completions", json=streamed) as reply:
        text = reply.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    joined = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert joined == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_a_shared_prefix_is_computed_once(smollm2: Server) -> None:
    text = " ".join(f"Item {i} of the list is number {i * 7}." for i in range(130))
    ids = smollm2.client.post("/tokenize", json={"prompt": text}).json()["tokens"][:1500]
    assert len(ids) == 1500

    def ttft(tail: list[int]) -> float:
        body = {"inputs": ids + tail, "parameters": {"max_new_tokens": 2, "ignore_eos": True}}
        began = time.perf_counter()
        with smollm2.client.stream("POST", "/generate_stream", json=body) as reply:
            next(stream_events(reply))
            return time.perf_counter() - began

    first = ttft([100, 101, 102])
    second = ttft([200, 201, 202])
    assert second < 0.3 * first, (first, second)


PROCESSES = ("supervisor", "frontend", "engine")


def test_health_models_and_metrics(smollm2: Server) -> None:
    assert smollm2.client.get("/health").status_code == 200
    assert smollm2.client.get("/readiness").json() == {"status": "ok"}
    model = smollm2.client.get("/v1/models").json()["data"][0]
    assert model["id"] == "smollm2-135m"
    assert model["max_model_len"] >= 8192
    before = smollm2.metric("generated_tokens_total")
    smollm2.generate("One two three", max_new_tokens=5, ignore_eos=True)
    assert smollm2.metric("generated_tokens_total") - before == 5
    assert smollm2.metric("kv_used_tokens") == 0
    sizes = {name: smollm2.metric("resident_memory_bytes", f'process="{name}"') / 2**20 for name in PROCESSES}
    assert 10 < sizes["supervisor"] < sizes["frontend"] < sizes["engine"] < 2000, sizes
