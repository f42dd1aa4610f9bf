"""A drill with real engines: a PD cluster whose nodes come, go, die and freeze under many streams.

Two pd_masters that nodes find through a config_server, prefill and decode nodes of a tiny random model, one
thread each; one trouble after another. Every token of every stream is compared with what a single
node has said to the same prompt. `benchmarks/pd_drill.py` runs it for minutes, `test_drill.py` briefly.
"""

import asyncio
import concurrent.futures
import itertools
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors.torch import save_file

from lightllm.model_config import ModelConfig
from lightllm.models import tensor_shapes
from tests.e2e.conftest import Server, free_port

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Large enough that the next token depends on all before it, and is seldom a near-tie.
WEIGHTS_STD = 0.3
LEAST_GAP = 1e-3
NODE_FLAGS = (
    *("--max_total_token_num", "8000", "--max_req_total_len", "900"),
    *("--chunked_prefill_size", "32", "--batch_max_tokens", "64"),
)
PROMPT_TOKENS = (20, 500)
OUTPUT_TOKENS = (10, 240)
FREEZE_S = 10.0
SETTLE_S = 3.0
JOIN_LIMIT_S = 40.0
# pd.md: a lost node is made up for within 10 s. What the loaded machine itself takes is allowed for.
GAP_LIMIT_S = 10.0
SLOWNESS_S = 2.0
MAX_ERROR_SHARE = 0.01
IDLE_LIMIT_S = 12.0
REMARKABLE = re.compile(r"Traceback|has not moved|dropped a message|could not be handled")
TRANSFER_FIGURES = {
    "transfer_bytes_total": ("direction", "transport"),
    "transfers_total": ("direction", "outcome"),
    "transfer_failures_total": ("direction", "reason"),
}
TROUBLES = (
    *(("kill", "decode"), ("drain", "prefill"), ("freeze", "decode"), ("kill", "prefill")),
    *(("freeze engine", "decode"), ("drain", "decode"), ("kill engine", "prefill"), ("freeze", "prefill")),
    *(("kill engine", "decode"), ("freeze engine", "prefill"), ("kill frontend", "decode")),
)


class Prompt(NamedTuple):
    """Token ids, and the ids that a single node puts behind them."""

    token_ids: list[int]
    answer: list[int]


class Plan(NamedTuple):
    """How long, how much, how hard. `think_s` is the mean pause of a stream between two requests."""

    seconds: float
    num_streams: int = 64
    think_s: float = 3.0
    num_prompts: int = 160
    seed: int = 0
    num_prefill: int = 2
    num_decode: int = 3


# ------------------------------------------------------------ model and oracle


def write_model(folder: Path) -> None:
    """A random model's folder."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.ones(shape)
        if name.endswith("norm.weight")
        else torch.empty(shape).normal_(std=WEIGHTS_STD, generator=generator)
        for name, shape in tensor_shapes(ModelConfig.from_hf(MODEL)).items()
    }
    save_file(tensors, folder / "model.safetensors")


def ask_one_node(model: list[str], env: dict[str, str], plan: Plan) -> list[Prompt]:
    """Prompts, and the greedy answers of a single node; none that ever was near a tie."""
    rng = random.Random(plan.seed)
    server = Server(*model, *NODE_FLAGS, env=env)

    def ask(prompt: list[int]) -> Prompt | None:
        body = {"prompt": prompt, "max_tokens": OUTPUT_TOKENS[1], "temperature": 0, "logprobs": 2}
        scored = server.client.post("/v1/completions", json={**body, "ignore_eos": True}).json()
        tops = [sorted(top.values()) for top in scored["choices"][0]["logprobs"]["top_logprobs"]]
        if any(len(top) < 2 or top[-1] - top[-2] < LEAST_GAP for top in tops):
            return None
        fields = {"max_new_tokens": OUTPUT_TOKENS[1], "ignore_eos": True, "return_details": True}
        tokens = server.generate(prompt, do_sample=False, **fields)["tokens"]
        return Prompt(prompt, [token["id"] for token in tokens])

    found: list[Prompt] = []
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            while len(found) < plan.num_prompts:
                lengths = [rng.randint(*PROMPT_TOKENS) for _ in range(16)]
                prompts = [[rng.randrange(10, MODEL["vocab_size"]) for _ in range(n)] for n in lengths]
                found += filter(None, pool.map(ask, prompts))
    finally:
        assert server.stop() == 0
    return found[: plan.num_prompts]


# ------------------------------------------------------------ clients


class Tally:
    """How requests ended, and how long their clients had to wait."""

    def __init__(self) -> None:
        self.num_right = 0
        self.num_tokens = 0
        self.errors: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.gaps_s: list[float] = []
        self.first_s: list[float] = []
        self.whole_s: list[float] = []


class Answer:
    """One stream's frames as they come.

    Attributes:
        gap_s: the longest wait for a frame, the first included.
    """

    def __init__(self, prompt: Prompt, num_tokens: int) -> None:
        self.prompt, self.num_tokens = prompt, num_tokens
        self.token_ids: list[int] = []
        self.error = ""
        self.wrong = ""
        self.is_whole = False
        self.began_s = self.last_s = time.monotonic()
        self.first_s = self.gap_s = 0.0

    def take(self, frame: dict[str, Any]) -> None:
        """A frame of /generate_stream."""
        now = time.monotonic()
        self.gap_s, self.last_s = max(self.gap_s, now - self.last_s), now
        if frame.get("error") is not None:
            self.error = frame["error"]["code"]
            return
        token, index = frame["token"], len(self.token_ids)
        self.first_s = self.first_s or now - self.began_s
        self.token_ids.append(token["id"])
        if self.is_whole or token["count_output_tokens"] != index + 1 or index >= self.num_tokens:
            self.wrong = f"frame {token['count_output_tokens']} came as number {index + 1}"
        elif token["id"] != self.prompt.answer[index]:
            self.wrong = self.wrong or f"token {index} is {token['id']}, not {self.prompt.answer[index]}"
        self.is_whole = frame["finished"]


async def stream(port: int, prompt: Prompt, num_tokens: int) -> Answer:
    """Send one request and read its answer to the end."""
    parameters = {"max_new_tokens": num_tokens, "do_sample": False, "ignore_eos": True}
    body = json.dumps({"inputs": prompt.token_ids, "parameters": parameters}).encode()
    head = (
        f"POST /generate_stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
    )
    answer = Answer(prompt, num_tokens)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        status = (await reader.readline()).split(b" ")[1:2]
        if status != [b"200"]:
            found = re.search(rb'"code":"(\w+)"', await reader.read())
            answer.error = found[1].decode() if found else f"status {status}"
            answer.gap_s = time.monotonic() - answer.began_s
            return answer
        while line := await reader.readline():
            if line.startswith(b"data:"):
                answer.take(msgspec.json.decode(line[5:]))
    except OSError as error:
        answer.wrong = f"the connection broke: {error}"
    finally:
        writer.close()
    if not answer.is_whole and not answer.error:
        answer.wrong = answer.wrong or f"cut off after {len(answer.token_ids)} of {num_tokens} tokens"
    return answer


async def client(
    port: int, prompts: list[Prompt], plan: Plan, number: int, tally: Tally, end_s: float
) -> None:
    """One stream after another until the time is over."""
    rng = random.Random(plan.seed * 1000 + number)
    while True:
        await asyncio.sleep(rng.expovariate(1 / plan.think_s))
        if time.monotonic() > end_s:
            return
        answer = await stream(port, rng.choice(prompts), rng.randint(*OUTPUT_TOKENS))
        tally.gaps_s.append(answer.gap_s)
        tally.whole_s.append(time.monotonic() - answer.began_s)
        tally.num_tokens += len(answer.token_ids)
        if answer.first_s:
            tally.first_s.append(answer.first_s)
        if answer.wrong:
            tally.wrong.append(answer.wrong)
        elif answer.error:
            tally.errors[answer.error] += 1
        else:
            tally.num_right += 1


# ------------------------------------------------------------ the cluster


class Fleet:
    """All processes of the cluster. Methods block: they run in threads."""

    def __init__(self, model: list[str], env: dict[str, str]) -> None:
        self.model, self.env = model, env
        port = str(free_port())
        self.where = ("--config_server_host", "127.0.0.1", "--config_server_port", port)
        self.directory = Server("--run_mode", "config_server", *self.where, env=env, port=None)
        self.masters = [
            Server("--run_mode", "pd_master", *self.where, *model, "--max_queued_requests", "256", env=env)
            for _ in range(2)
        ]
        self.nodes: dict[str, Server] = {}
        self.count = itertools.count()

    def add(self, role: str) -> str:
        """Start a node and wait until both masters have it."""
        name = f"{role}-{next(self.count)}"
        self.nodes[name] = Server("--run_mode", role, *self.where, *self.model, *NODE_FLAGS, env=self.env)
        self.wait_for(name)
        return name

    def wait_for(self, name: str) -> None:
        """Until both masters have this node."""
        server = self.nodes[name]
        address = server.url.removeprefix("http://")
        server.wait_until(lambda: all(address in addresses(m) for m in self.masters), JOIN_LIMIT_S)

    def pids(self, name: str) -> list[int]:
        server = self.nodes[name]
        return [server.process.pid, *server.children().values()]

    def trouble(self, kind: str, name: str) -> None:
        """Make trouble for a node, and then have the fleet whole again."""
        server, role = self.nodes[name], name.partition("-")[0]
        if kind == "kill":
            for pid in self.pids(name):
                os.kill(pid, signal.SIGKILL)
            self.nodes.pop(name).stop()
            self.add(role)
        elif kind == "drain":
            assert self.nodes.pop(name).stop() == 0, "a drained node exits with 0"
            self.add(role)
        elif kind.startswith("kill "):
            os.kill(server.children()[kind.partition(" ")[2]], signal.SIGKILL)
            time.sleep(1)
            self.wait_for(name)
        else:
            pids = [server.children()["engine"]] if kind == "freeze engine" else self.pids(name)
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(FREEZE_S)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            self.wait_for(name)

    def leftovers(self) -> list[str]:
        """What is not at its base, in words."""
        found = []
        for index, master in enumerate(self.masters):
            live = master.client.get("/debug/requests?state=live").json()["requests"]
            found += [f"master {index} has {len(live)} live requests"] if live else []
            page = master.client.get("/cluster", headers={"accept": "application/json"}).json()
            for node in page["nodes"]:
                used = {name: node[name] for name in ("requests", "requests_running", "kv_used_tokens")}
                found += [f"master {index} of {node['node']}: {used}"] if any(used.values()) else []
        for name, server in self.nodes.items():
            for figure in ("requests_running", "requests_waiting", "kv_used_tokens"):
                value = server.metric(figure)
                found += [f"{name}: {figure} is {value:g}"] if value else []
        return found

    def wait_idle(self) -> list[str]:
        """What is not at its base some seconds after the last request."""
        until_s = time.monotonic() + IDLE_LIMIT_S
        while (left := self.leftovers()) and time.monotonic() < until_s:
            time.sleep(0.2)
        return left

    def remarks(self) -> list[str]:
        """What is in the logs and should not be."""
        servers = (*self.masters, *self.nodes.values())
        return [line.strip() for server in servers for line in server.log if REMARKABLE.search(line)][:40]

    def stop(self) -> list[int]:
        """Exit codes of all."""
        return [server.stop() for server in (*self.nodes.values(), *self.masters, self.directory)]


def addresses(master: Server) -> set[str]:
    """Of the nodes that a master has."""
    page = master.client.get("/cluster", headers={"accept": "application/json"}).json()
    return {node["address"] for node in page["nodes"]}


def total(servers: list[Server], name: str, *labels: str) -> dict[str, float]:
    """A counter of /metrics, added up over everything but these labels."""
    found: Counter[str] = Counter()
    for server in servers:
        for line in server.client.get("/metrics").text.splitlines():
            if line.startswith(f"lightllm_{name}{{"):
                given = dict(re.findall(r'(\w+)="([^"]*)"', line))
                found[", ".join(given[label] for label in labels)] += float(line.rpartition(" ")[2])
    return dict(found)


# ------------------------------------------------------------ the drill


async def make_trouble(fleet: Fleet, plan: Plan, end_s: float, say: Callable[[str], None]) -> list[Any]:
    """One trouble after another; what was done, when, and how long it took until the fleet was whole."""
    rng, done, began_s = random.Random(plan.seed), [], time.monotonic()
    for kind, role in itertools.cycle(TROUBLES):
        await asyncio.sleep(SETTLE_S)
        if time.monotonic() > end_s:
            return done
        name = rng.choice([name for name in fleet.nodes if name.startswith(role)])
        start_s = time.monotonic()
        await asyncio.to_thread(fleet.trouble, kind, name)
        done.append([round(start_s - began_s, 1), kind, name, round(time.monotonic() - start_s, 1)])
        say(f"{done[-1]}")
    return done


async def run(folder: Path, plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Set up, make trouble under load, and look at what is left."""
    write_model(folder)
    model = ["--model_dir", str(folder), "--tokenizer_dir", "smollm2-135m"]
    env = {"LIGHTLLM_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    prompts = await asyncio.to_thread(ask_one_node, model, env, plan)
    say(f"{len(prompts)} prompts are answered by a single node")
    fleet = await asyncio.to_thread(Fleet, model, env)
    try:
        roles = ["prefill"] * plan.num_prefill + ["decode"] * plan.num_decode
        await asyncio.gather(*(asyncio.to_thread(fleet.add, role) for role in roles))
        for master in fleet.masters:
            await asyncio.to_thread(
                master.wait_until,
                lambda master=master: master.client.get("/readiness").status_code == 200,
                30,
            )
        say("the cluster is ready")
        tally, end_s = Tally(), time.monotonic() + plan.seconds
        ports = [int(master.url.rpartition(":")[2]) for master in fleet.masters]
        clients = [client(ports[i % 2], prompts, plan, i, tally, end_s) for i in range(plan.num_streams)]
        cpu_s, began_s = busy_s(), time.monotonic()
        troubles, *_ = await asyncio.gather(make_trouble(fleet, plan, end_s, say), *clients)
        result = report(plan, tally, troubles)
        result["cpu_load"] = round(
            (busy_s() - cpu_s) / (time.monotonic() - began_s) / (os.cpu_count() or 1), 2
        )
        result["left_over"] = await asyncio.to_thread(fleet.wait_idle)
        result["failovers"] = total(fleet.masters, "failovers_total", "reason")
        result["kv_transfers"] = {
            name: total(fleet.masters[:1], f"kv_{name}", *labels) for name, labels in TRANSFER_FIGURES.items()
        }
        result["log"] = fleet.remarks()
    finally:
        codes = await asyncio.to_thread(fleet.stop)
    result["exit_codes"] = codes
    return result


def busy_s() -> float:
    """CPU seconds that this machine has worked since it began."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def report(plan: Plan, tally: Tally, troubles: list[Any]) -> dict[str, Any]:
    """The figures of a run."""
    num_errors = sum(tally.errors.values())
    return {
        "plan": plan._asdict(),
        "requests": tally.num_right + num_errors + len(tally.wrong),
        "right": tally.num_right,
        "errors": dict(tally.errors),
        "wrong": tally.wrong[:20],
        "num_wrong": len(tally.wrong),
        "tokens": tally.num_tokens,
        "longest_wait_s": percentiles(tally.gaps_s),
        "first_token_s": percentiles(tally.first_s),
        "whole_request_s": percentiles(tally.whole_s),
        "troubles": troubles,
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Some of them."""
    ordered = sorted(values) or [0.0]
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)
        for name, share in shares.items()
    }


def breaches(result: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found = [f"wrong: {text}" for text in result["wrong"]]
    num_errors = sum(result["errors"].values())
    if num_errors > MAX_ERROR_SHARE * result["requests"]:
        found.append(f"{num_errors} of {result['requests']} requests ended in an error: {result['errors']}")
    if result["longest_wait_s"]["max"] > GAP_LIMIT_S + SLOWNESS_S:
        found.append(f"a client waited {result['longest_wait_s']['max']} s for a frame")
    found += [f"left over: {text}" for text in result["left_over"]]
    if any(result["exit_codes"]):
        found.append(f"exit codes {result['exit_codes']}")
    return found
