"""Two machines of one node: in two network namespaces where this user may make them, else on loopback."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180), pytest.mark.xdist_group("e2e")]

SPACES = ("lightllm-t0", "lightllm-t1")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
# What a client inside a namespace runs: prints the status and the answer.
DRIVER = """
import json, sys, urllib.request
url, num_tokens = sys.argv[1], int(sys.argv[2])
fields = {"max_new_tokens": num_tokens, "ignore_eos": True}
body = {"inputs": "The capital of France is", "parameters": fields}
data = json.dumps(body).encode() if num_tokens else None
request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
try:
    reply = urllib.request.urlopen(request, timeout=60)
except urllib.error.HTTPError as error:
    reply = error
print(reply.status, reply.read().decode())
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    return subprocess.run(["ip", "netns", "add", SPACES[0]], capture_output=True, check=False).returncode == 0


@pytest.fixture
def network() -> Iterator[Callable[[int], list[str]]]:
    """What to put before a command so that it runs on machine 0 or 1; two spaces joined by one cable."""
    if not can_make_namespaces():
        pytest.skip("this user may not make network namespaces")
    try:
        ip("netns", "add", SPACES[1])
        ip(
            "link",
            "add",
            "lightllm-v0",
            "netns",
            SPACES[0],
            "type",
            "veth",
            "peer",
            "lightllm-v1",
            "netns",
            SPACES[1],
        )
        for space, address, device in zip(SPACES, ADDRESSES, ("lightllm-v0", "lightllm-v1"), strict=True):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", space, "link", "set", device, "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield lambda machine: ["ip", "netns", "exec", SPACES[machine]]
    finally:
        for space in SPACES:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


class Machine:
    """One server process of the node; what it prints goes to a file."""

    def __init__(self, prefix: list[str], home: Path, number: int, *flags: str, token: str = "") -> None:
        env = {**os.environ, "LIGHTLLM_HOME": str(home)}
        if token:
            env["LIGHTLLM_CLUSTER_TOKEN"] = token
        self.log = home / f"log-{number}"
        command = [*prefix, sys.executable, "-m", "lightllm.server.api_server", *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def wait_for(self, pattern: str, timeout_s: float = 60) -> re.Match[str]:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            found = re.search(pattern, self.log.read_text())
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} within {timeout_s} s in:\n" + self.log.read_text()[-5000:])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=40)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def machines(tmp_path) -> Iterator[Callable[..., Machine]]:
    started: list[Machine] = []

    def start(prefix: list[str], *flags: str, **options: str) -> Machine:
        started.append(Machine(prefix, tmp_path, len(started), *flags, **options))
        return started[-1]

    yield start
    for machine in reversed(started):
        machine.stop()


def call(prefix: list[str], url: str, num_tokens: int = 0) -> tuple[int, str]:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", DRIVER, url, str(num_tokens)],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    status, _, text = done.stdout.partition(" ")
    return int(status), text


def test_two_machines_serve_and_a_cut_cable_ends_their_requests(network, machines) -> None:
    flags = ("--tp", "2", "--graph_max_batch_size", "100", "--nccl_host", ADDRESSES[0], "--nnodes", "2")
    other = machines(network(1), *flags, "--node_rank", "1")  # in any order
    other.wait_for(r"waiting for machine 0 at 10\.213\.7\.1:28766")
    first = machines(network(0), *flags, "--node_rank", "0", "--port", "0")
    url = first.wait_for(r"ready: (http://\S+) ")[1]
    status, text = call(network(0), f"{url}/generate", 12)
    assert status == 200
    assert " Paris" in text

    running = threading.Thread(target=lambda: answers.append(call(network(0), f"{url}/generate", 3000)))
    answers: list[tuple[int, str]] = []
    running.start()
    time.sleep(2)
    ip("-n", SPACES[1], "link", "set", "lightllm-v1", "down")
    cut = time.monotonic()
    running.join(timeout=30)
    assert time.monotonic() - cut < 10
    named = rf"machine 1 \({re.escape(socket.gethostname())}\) has not been heard of for 6 s"
    assert answers[0][0] == 503
    assert re.search(f"{named}|rank 1 on machine 1", answers[0][1]), answers
    status, text = call(network(0), f"{url}/health")
    assert status == 503
    assert "machine 1" in text
    other.wait_for(r"machine 0 \(10\.213\.7\.1:28766\) has not been heard of for 6 s")

    ip("-n", SPACES[1], "link", "set", "lightllm-v1", "up")
    end = time.monotonic() + 60
    while call(network(0), f"{url}/readiness")[0] != 200 and time.monotonic() < end:
        time.sleep(0.5)
    again = call(network(0), f"{url}/generate", 12)
    assert again[0] == 200
    assert " Paris" in again[1]
    assert first.stop() == 0
    assert other.stop() == 0


@pytest.mark.parametrize(
    ("changes", "token", "words"),
    [
        (("--tp", "4"), "", ["--tp: 4 there, 2 on machine 0"]),
        (("--override_config", '{"vocab_size": 77}'), "", ["model: LlamaForCausalLM"]),
        ((), "another-token-than-theirs", ["the cluster tokens differ", "LIGHTLLM_CLUSTER_TOKEN"]),
    ],
    ids=["tp", "model", "token"],
)
def test_a_machine_that_does_not_fit_is_told_why_on_both_sides(
    machines, tiny_model, changes, token, words
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    model = ("--model_dir", tiny_model, "--load_format", "dummy", "--multinode_port", port, "--nnodes", "2")
    first = machines([], *model, "--tp", "2", "--port", "0")
    first.wait_for(r"waiting at 127\.0\.0\.1:\d+ for machine 1 of 2")
    flags = changes if "--tp" in changes else ("--tp", "2", *changes)
    other = machines([], *model, *flags, "--node_rank", "1", token=token)
    assert other.process.wait(timeout=20) == 2
    for word in words:
        other.wait_for(re.escape(word), 1)
        first.wait_for(re.escape(word), 5)
