"""Prefill/decode disaggregation with the default model: all roles as a user starts them."""

import concurrent.futures
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Server, stream_events

NODE = ("--max_total_token_num", "4096", "--max_req_total_len", "2048")
# Nobody of these ends in a near-tie of SmolLM2 in float32.
PROMPTS = (
    "What is AI?",
    "The capital of France is",
    "Once upon a time there was a king who " + "lived in a castle by the sea and " * 16,
    "Water boils at a temperature of",
)


class Cluster:
    """One pd_master, and nodes that are started as needed."""

    def __init__(self, folder: Path, *model: str) -> None:
        self.model = model
        self.env = {"LIGHTLLM_HOME": str(folder), "OMP_NUM_THREADS": "1"}
        self.servers: dict[str, Server] = {}
        self.master = self.start("master", "pd_master")

    def start(self, name: str, role: str, *flags: str) -> Server:
        self.servers[name] = Server("--run_mode", role, *self.model, *flags, env=self.env)
        return self.servers[name]

    def start_nodes(self, **roles: str) -> None:
        """Names and roles, started side by side."""
        link = ("--pd_master_ip", "127.0.0.1", "--pd_master_port", self.master.url.rpartition(":")[2])
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda item: self.start(*item, *link, *NODE), roles.items()))

    def nodes(self) -> dict[str, dict]:
        """What the master knows of each node, by its port."""
        page = self.master.client.get("/cluster", headers={"accept": "application/json"}).json()
        return {node["address"].rpartition(":")[2]: node for node in page["nodes"]}

    def seen(self, name: str) -> dict | None:
        return self.nodes().get(self.servers[name].url.rpartition(":")[2])

    def ready(self) -> None:
        self.master.wait_until(lambda: self.master.client.get("/readiness").status_code == 200, 20)

    def kill(self, name: str) -> None:
        """SIGKILL for all processes of a node."""
        server = self.servers.pop(name)
        for pid in (server.process.pid, *server.children().values()):
            os.kill(pid, signal.SIGKILL)
        server.stop()

    def stop(self) -> None:
        codes = {name: server.stop() for name, server in reversed(self.servers.items())}
        assert set(codes.values()) == {0}, codes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("pd"))
    found.start_nodes(p1="prefill", d1="decode")
    found.ready()
    yield found
    found.stop()


def answers(server: Server) -> list[object]:
    """What a node or a cluster says to all kinds of requests."""
    found: list[object] = [server.generate(prompt, max_new_tokens=12, do_sample=False) for prompt in PROMPTS]
    found.append(server.generate(PROMPTS[2] + " and", max_new_tokens=6, do_sample=False))
    found.append(server.generate(PROMPTS[0], max_new_tokens=8, n=2, seed=7, temperature=0.8))
    found.append(server.generate(PROMPTS[1], max_new_tokens=1, do_sample=False))
    body = {
        "model": "smollm2-135m",
        "prompt": PROMPTS[0],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": 2,
        "echo": True,
    }
    choice = server.client.post("/v1/completions", json=body).json()["choices"][0]
    choice["logprobs"] = {
        "tokens": choice["logprobs"]["tokens"],
        "rounded": [x and round(x, 3) for x in choice["logprobs"]["token_logprobs"]],
    }
    found.append(choice)
    chat = {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
    }
    with server.client.stream("POST", "/v1/chat/completions", json=chat) as reply:
        found.append("".join(e["choices"][0]["delta"].get("content", "") for e in stream_events(reply)))
    stopped = {"max_new_tokens": 20, "do_sample": False, "stop_sequences": ["."]}
    found.append(server.generate(PROMPTS[1], **stopped))
    return found


def test_a_cluster_answers_as_a_single_node(cluster: Cluster, smollm2: Server) -> None:
    alone, together = answers(smollm2), answers(cluster.master)
    for one, other in zip(alone, together, strict=True):
        assert one == other
    # Prefixes are cached by now, wholly or in part.
    assert answers(cluster.master) == alone


def test_kv_really_moves(cluster: Cluster) -> None:
    reply = cluster.master.client.post(
        "/generate", json={"inputs": "A prompt that nobody has seen.", "parameters": {"max_new_tokens": 6}}
    )
    shown = cluster.master.client.get(f"/debug/requests/{reply.headers['x-request-id']}").json()
    events = {node["role"]: [event for event, _ in node["events"]] for node in shown["nodes"]}
    assert events["prefill"] == ["sent", "first token", "handed over"]
    assert events["decode"] == ["sent", "reserved", "finished: length"]
    own = {node["role"]: node["own"] for node in shown["nodes"] if "own" in node}
    assert {role: view["state"] for role, view in own.items()} == {
        "prefill": "finished",
        "decode": "finished",
    }
    names = {role: [name for name, _ in view["events"]] for role, view in own.items()}
    assert names["prefill"] == ["queued", "prefill_start", "prompt_computed", "kv_sent", "finished"]
    assert names["decode"] == ["queued", "kv_reserved", "kv_received", "finished"]
    times = [time_s for view in own.values() for _, time_s in view["events"]]
    assert all(abs(time.time() - time_s) < 60 for time_s in times)


def test_metrics_of_both_nodes_and_the_master_tell_of_transfers(cluster: Cluster) -> None:
    sent, received = 'direction="sent",transport="shm"', 'direction="received",transport="shm"'
    p1, d1, master = cluster.servers["p1"], cluster.servers["d1"], cluster.master
    before = p1.metric("kv_transfer_bytes_total", sent)
    prompt = " ".join(f"{i} bottles," for i in range(20))
    tokens = master.generate(prompt, max_new_tokens=6)["prompt_tokens"]
    moved = p1.metric("kv_transfer_bytes_total", sent) - before
    assert moved == tokens * 2 * 30 * 3 * 64 * 4  # keys and values, layers, heads, numbers, float32
    ok = 'transport="shm",outcome="ok"'
    assert p1.metric("kv_transfers_total", ok) == d1.metric("kv_transfers_total", ok) >= 2
    assert d1.metric("kv_transfer_bytes_total", received) == before + moved
    assert p1.metric("kv_transfer_duration_count") == p1.metric("kv_transfers_total", ok)
    for role, way in (("prefill", sent), ("decode", received)):
        line = f'role="{role}",{way}}} {before + moved:.0f}\n'
        master.wait_until(lambda line=line: line in master.client.get("/metrics").text, 4)
    assert "kv_transfer_failures_total{" not in master.client.get("/metrics").text


def test_nodes_serve_operations_only(cluster: Cluster) -> None:
    node = cluster.servers["d1"]
    assert node.client.get("/readiness").status_code == 200
    assert node.client.get("/health").status_code == 200
    assert "lightllm_kv_total_tokens" in node.client.get("/metrics").text
    reply = node.client.post("/generate", json={"inputs": "x"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "wrong_role")
    assert cluster.master.url.removeprefix("http://") in reply.json()["message"]
    assert "kv_tokens" not in cluster.master.ready_line
    assert len(cluster.master.client.get("/token_load").json()["nodes"]) == 2
    assert cluster.master.metric("nodes_ready", 'role="decode"') == 1
    assert cluster.master.metric("node_kv_total_tokens", 'role="prefill"') == 4096
    assert re.search(r"mode=decode device=\w+ kv_tokens=4096", node.ready_line)


def test_many_streams_and_no_leak(cluster: Cluster, smollm2: Server) -> None:
    prompts = [f"Number {i} is followed by" for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(
            pool.map(lambda p: cluster.master.generate(p, max_new_tokens=12, do_sample=False), prompts)
        )
    assert [len(answer["generated_text"][0]) > 0 for answer in found] == [True] * 12
    assert {answer["finish_reason"] for answer in found} <= {"length", "stop"}
    assert max(answer["count_output_tokens"] for answer in found) == 12
    for name in ("p1", "d1"):
        cluster.master.wait_until(lambda name=name: cluster.seen(name)["requests"] == 0)
        node = cluster.servers[name]
        node.wait_until(lambda node=node: node.metric("requests_running") == 0)
        node.wait_until(lambda node=node: node.metric("kv_used_tokens") == 0)


def test_a_decode_node_that_is_killed_costs_no_token(tmp_path: Path, tiny_model: str) -> None:
    """Plain float32 kernels: what the next node computes anew must give the same tokens."""
    model = ("--model_dir", tiny_model, "--load_format", "dummy", "--attention_backend", "torch")
    cluster = Cluster(tmp_path, *model)
    try:
        cluster.start_nodes(p1="prefill", d1="decode", d2="decode")
        cluster.master.wait_until(lambda: len(cluster.nodes()) == 3)
        cluster.ready()
        parameters = {"max_new_tokens": 400, "do_sample": False, "ignore_eos": True}
        wanted = cluster.master.generate("The story", **parameters)["generated_text"][0]
        text, killed, frames = "", "", 0
        body = {"inputs": "The story", "parameters": parameters}
        with cluster.master.client.stream("POST", "/generate_stream", json=body) as reply:
            for event in stream_events(reply):
                text += event["token"]["text"]
                frames += 1
                if frames == 30:
                    killed = next(name for name in ("d1", "d2") if cluster.seen(name)["requests"])
                    cluster.kill(killed)
        assert frames == 400
        assert text == wanted
        cluster.master.wait_until(lambda: len(cluster.nodes()) == 2)
    finally:
        cluster.stop()


def test_a_prefill_node_that_is_killed_costs_only_time(cluster: Cluster, smollm2: Server) -> None:
    prompt = "A very long text: " + " ".join(str(i) for i in range(160))
    wanted = smollm2.generate(prompt, max_new_tokens=8, do_sample=False)["generated_text"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(cluster.master.generate, prompt, max_new_tokens=8, do_sample=False)
        cluster.master.wait_until(lambda: cluster.seen("p1")["requests"] > 0)
        cluster.kill("p1")
        assert answer.result()["generated_text"] == wanted
    # Without a prefill node the decode node does it all, but the cluster is not ready.
    assert cluster.master.client.get("/readiness").status_code == 503
    assert cluster.master.generate("Alone", max_new_tokens=4)["count_output_tokens"] == 4
    cluster.start_nodes(p1="prefill")
    cluster.ready()


def test_a_node_that_is_stopped_drains(cluster: Cluster) -> None:
    cluster.start_nodes(p2="prefill")
    cluster.master.wait_until(lambda: cluster.seen("p2") is not None)
    assert cluster.servers.pop("p2").stop() == 0
    cluster.master.wait_until(lambda: len(cluster.nodes()) == 2, 3)
    assert cluster.master.generate("Still here", max_new_tokens=4)["count_output_tokens"] == 4


def test_another_cluster_token_is_refused_on_both_sides(tmp_path: Path, tiny_model: str, start) -> None:
    master = start("--run_mode", "pd_master", env={"LIGHTLLM_CLUSTER_TOKEN": "the-token-of-the-master"})
    link = ("--pd_master_ip", "127.0.0.1", "--pd_master_port", master.url.rpartition(":")[2])
    small = ("--max_total_token_num", "512")
    node = start(
        "--run_mode", "decode", *link, *small, env={"LIGHTLLM_CLUSTER_TOKEN": "another-token-altogether"}
    )
    node.wait_until(lambda: "cluster tokens differ" in node.client.get("/readiness").text)
    end = time.monotonic() + 5
    while not any("cluster tokens differ" in line for line in master.log) and time.monotonic() < end:
        time.sleep(0.05)
    assert any("cluster tokens differ" in line for line in master.log)
    assert httpx.get(f"{master.url}/cluster", headers={"accept": "application/json"}).json()["nodes"] == []
