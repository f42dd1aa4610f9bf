"""A PD cluster of real processes with a tiny random model, and what a single node says to the same prompts.

Two pd_masters that nodes find through a config_server, prefill and decode nodes as needed, one thread each.
For tests that make trouble: answers are streamed and compared token by token.
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
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors.torch import save_file

from lightllm.model_config import ModelConfig
from lightllm.models import tensor_shapes
from tests.e2e.conftest import TINY_CONFIG, Server, free_port

MODEL = {**TINY_CONFIG, "vocab_size": 512, "max_position_embeddings": 2048, "tie_word_embeddings": False}
# Large enough that the next token depends on all before it, and is seldom a near-tie.
WEIGHTS_STD = 0.3
LEAST_GAP = 1e-3
NODE_FLAGS = (*("--max_req_total_len", "900", "--chunked_prefill_size", "32", "--batch_max_tokens", "64"),)
KV_TOKENS = 8000
PROMPT_TOKENS = (20, 500)
OUTPUT_TOKENS = (10, 240)
FREEZE_S = 10.0
JOIN_LIMIT_S = 40.0
IDLE_LIMIT_S = 12.0
REMARKABLE = re.compile(r"Traceback|has not moved|dropped a message|could not be handled")


class Prompt(NamedTuple):
    """Token ids, and the ids that a single node puts behind them."""

    token_ids: list[int]
    answer: list[int]


# ------------------------------------------------------------ model and oracle


def describe_model(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Write a random model into a folder; flags and environment of servers that use it."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.ones(shape)
        if name.endswith("norm.weight")
        else torch.empty(shape).normal_(std=WEIGHTS_STD, generator=generator)
        for name, shape in tensor_shapes(ModelConfig.from_hf(MODEL)).items()
    }
    save_file(tensors, folder / "model.safetensors")
    flags = ["--model_dir", str(folder), "--tokenizer_dir", "smollm2-135m"]
    return flags, {"LIGHTLLM_HOME": str(folder), "OMP_NUM_THREADS": "1"}


def ask_one_node(model: list[str], env: dict[str, str], num_prompts: int, seed: int = 0) -> list[Prompt]:
    """Prompts, and the greedy answers of a single node; none that ever was near a tie."""
    rng = random.Random(seed)
    server = Server(*model, *sized(KV_TOKENS), env=env)

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
            while len(found) < num_prompts:
                lengths = [rng.randint(*PROMPT_TOKENS) for _ in range(16)]
                prompts = [[rng.randrange(10, MODEL["vocab_size"]) for _ in range(n)] for n in lengths]
                found += filter(None, pool.map(ask, prompts))
    finally:
        assert server.stop() == 0
    return found[:num_prompts]


# ------------------------------------------------------------ streams


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
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:  # a master that was killed between two requests
        answer.wrong = f"the connection broke before it was made: {error}"
        return answer
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


# ------------------------------------------------------------ the cluster


class Fleet:
    """All processes of the cluster. Methods block: event loops call them in threads.

    Attributes:
        where: the flags that name the config_server.
    """

    def __init__(self, model: list[str], env: dict[str, str]) -> None:
        self.model, self.env = model, env
        self.where = ("--config_server_host", "127.0.0.1", "--config_server_port", str(free_port()))
        self.directory = self.start_directory()
        self.masters = [self.start_master() for _ in range(2)]
        self.nodes: dict[str, Server] = {}
        self.count = itertools.count()

    def start_directory(self) -> Server:
        return Server("--run_mode", "config_server", *self.where, env=self.env, port=None)

    def start_master(self) -> Server:
        return Server("--run_mode", "pd_master", *self.where, *self.model, env=self.env)

    def start(self, roles: list[str]) -> list[str]:
        """Start nodes side by side and wait until KV has moved; their names."""
        with concurrent.futures.ThreadPoolExecutor() as pool:
            names = list(pool.map(self.add, roles))
        for master in self.masters:
            master.wait_until(lambda master=master: master.client.get("/readiness").status_code == 200, 30)
        return names

    def add(self, role: str, *flags: str, port: int = 0, kv_tokens: int = KV_TOKENS) -> str:
        """Start a node and wait until all masters have it."""
        name = f"{role}-{next(self.count)}"
        given = ("--run_mode", role, *self.where, *self.model, *sized(kv_tokens), *flags)
        self.nodes[name] = Server(*given, env=self.env, port=port)
        self.wait_for(name)
        return name

    def wait_for(self, name: str) -> None:
        """Until all masters have this node."""
        server = self.nodes[name]
        address = server.url.removeprefix("http://")
        server.wait_until(lambda: all(address in addresses(m) for m in self.masters), JOIN_LIMIT_S)

    def trouble(self, kind: str, *names: str) -> None:
        """Make trouble for nodes, and then have the fleet whole again."""
        if kind == "kill":
            for name in names:
                kill(self.nodes.pop(name))
                self.add(name.partition("-")[0])
        elif kind == "drain":
            for name in names:
                assert self.nodes.pop(name).stop() == 0, "a drained node exits with 0"
                self.add(name.partition("-")[0])
        elif kind.startswith("kill "):
            for name in names:
                os.kill(self.nodes[name].children()[kind.partition(" ")[2]], signal.SIGKILL)
            time.sleep(1)
        elif kind == "freeze engine":
            freeze([self.nodes[name].children()["engine"] for name in names])
        else:
            freeze([pid for name in names for pid in pids_of(self.nodes[name])])
        for name in self.nodes.keys() & set(names):
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


def sized(kv_tokens: int) -> tuple[str, ...]:
    """Flags of a node with so much KV."""
    return (*NODE_FLAGS, "--max_total_token_num", str(kv_tokens))


def pids_of(server: Server) -> list[int]:
    """Of all its processes."""
    return [server.process.pid, *server.children().values()]


def kill(server: Server) -> None:
    """SIGKILL for all its processes."""
    for pid in pids_of(server):
        os.kill(pid, signal.SIGKILL)
    server.stop()


def freeze(pids: list[int]) -> None:
    """SIGSTOP for so long, then SIGCONT."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(FREEZE_S)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
