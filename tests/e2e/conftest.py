"""Real servers on loopback: every process, socket and model as a user would start them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Server:
    """One `lightllm.server.api_server`, started with the given flags on a free port; None: without --port."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None, port: int | None = 0) -> None:
        http = [] if port is None else ["--port", str(port)]
        self.started = time.monotonic()
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightllm.server.api_server", *http, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.drain = threading.Thread(target=self._read_log, daemon=True)
        self.drain.start()
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        self.start_s = time.monotonic() - self.started
        found = re.match(r"ready: (http://\S+) ", self.ready_line)
        if found is None:
            self.process.wait(timeout=10)
            self.drain.join(timeout=5)
            raise AssertionError(f"exit {self.process.returncode}; log:\n" + "".join(self.log))
        self.url = found[1]
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def generate(self, inputs: str | list[int], **parameters: object) -> dict[str, object]:
        reply = self.client.post("/generate", json={"inputs": inputs, "parameters": parameters})
        assert reply.status_code == 200, reply.text
        return reply.json()

    def children(self) -> dict[str, int]:
        """Pids of the node's processes by name (engine, frontend, config_server)."""
        found = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            for name in ("engine", "frontend", "config_server"):
                if f"lightllm.server.{name}_main" in command:
                    found[name] = int(pid)
        return found

    def metric(self, name: str, label: str = "") -> float:
        """A sample of /metrics; `label` picks one of several by a part of its labels."""
        text = self.client.get("/metrics").text
        found = re.search(rf"^lightllm_{name}{{[^}}]*{label}[^}}]*}} (\S+)$", text, re.MULTILINE)
        assert found is not None, f"no metric {name} in:\n{text}"
        return float(found[1])

    def wait_until(self, condition, timeout_s: float = 15) -> None:
        """Poll until `condition()` holds; a server that does not answer counts as not yet."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not within {timeout_s} s; log:\n" + "".join(self.log[-30:]))

    def stop(self) -> int:
        """SIGTERM and wait; returns the exit code."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout=40)
        finally:
            self.process.kill()
            self.process.wait()
            self.drain.join(timeout=5)
            for stream in (self.process.stdout, self.process.stderr):
                assert stream is not None
                stream.close()
        return code


def free_port() -> int:
    """One that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stream_events(reply: httpx.Response) -> Iterator[dict[str, object]]:
    """JSON of each SSE frame, of either dialect; [DONE] ends it."""
    for line in reply.iter_lines():
        if line.startswith("data:"):
            data = line[5:].strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a two-layer model's config.json, for --load_format dummy."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return str(folder)


@pytest.fixture
def start(tiny_model: str):
    """Start servers of the tiny random model; all are stopped at the end."""
    servers: list[Server] = []

    def run(*flags: str, **kwargs) -> Server:
        server = Server("--model_dir", tiny_model, "--load_format", "dummy", *flags, **kwargs)
        servers.append(server)
        return server

    yield run
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Server]:
    """The default model, as `make serve` starts it."""
    server = Server()
    yield server
    assert server.stop() == 0
