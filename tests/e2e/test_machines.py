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


class Namespaces:
    """Two network namespaces joined by one cable, which can be cut."""

    address, port = "10.213.7.1", 28766

    def __init__(self) -> None:
        self.spaces = [f"lightllm-{os.getpid()}-{machine}" for machine in (0, 1)]
        try:
            for space in self.spaces:
                ip("netns", "add", space)
            ends = [("cable", "netns", space) for space in self.spaces]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for number, space in enumerate(self.spaces, 1):
                ip("-n", space, "addr", "add", f"10.213.7.{number}/24", "dev", "cable")
                ip("-n", space, "link", "set", "cable", "up")
                ip("-n", space, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError):
            self.close()
            pytest.skip("this user may not make network namespaces")

    def prefix(self, machine: int) -> list[str]:
        """What to put before a command so that it runs there."""
        return ["ip", "netns", "exec", self.spaces[machine]]

    def cut(self, other: "Machine") -> None:
        ip("-n", self.spaces[1], "link", "set", "cable", "down")

    def mend(self, other: "Machine") -> None:
        ip("-n", self.spaces[1], "link", "set", "cable", "up")

    def close(self) -> None:
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


class Loopback:
    """Two servers on one machine; instead of the cable the other server is frozen."""

    address = "127.0.0.1"

    def __init__(self) -> None:
        self.port = free_port()

    def prefix(self, machine: int) -> list[str]:
        return []

    def cut(self, other: "Machine") -> None:
        other.process.send_signal(signal.SIGSTOP)

    def mend(self, other: "Machine") -> None:
        other.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        return


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(params=[Namespaces, Loopback])
def network(request) -> Iterator[Namespaces | Loopback]:
    if request.param is Namespaces and (os.geteuid() != 0 or shutil.which("ip") is None):
        pytest.skip("this user may not make network namespaces")
    made = request.param()
    yield made
    made.close()


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


def test_two_machines_serve_and_a_lost_one_ends_their_requests(network, machines) -> None:
    flags = ["--tp", "2", "--graph_max_batch_size", "100", "--nccl_host", network.address, "--nnodes", "2"]
    if network.port != 28766:
        flags += ["--multinode_port", str(network.port), "--nccl_port", str(free_port())]
    here, there = network.prefix(0), network.prefix(1)
    place = rf"{re.escape(network.address)}:{network.port}"
    other = machines(there, *flags, "--node_rank", "1")  # in any order
    other.wait_for(f"waiting for machine 0 at {place}")
    first = machines(here, *flags, "--node_rank", "0", "--port", "0")
    url = first.wait_for(r"ready: (http://\S+) ")[1]
    status, text = call(here, f"{url}/generate", 12)
    assert status == 200
    assert " Paris" in text

    answers: list[tuple[int, str]] = []
    running = threading.Thread(target=lambda: answers.append(call(here, f"{url}/generate", 3000)))
    running.start()
    time.sleep(2)
    network.cut(other)
    cut = time.monotonic()
    running.join(timeout=30)
    assert time.monotonic() - cut < 10
    named = rf"machine 1 \({re.escape(socket.gethostname())}\) has not been heard of for \d s"
    assert answers[0][0] == 503
    assert re.search(named, answers[0][1]), answers
    status, text = call(here, f"{url}/health")
    assert status == 503
    assert "machine 1" in text

    network.mend(other)
    other.wait_for(rf"ERROR .*machine 0 \({place}\)")
    end = time.monotonic() + 60
    while call(here, f"{url}/readiness")[0] != 200 and time.monotonic() < end:
        time.sleep(0.5)
    again = call(here, f"{url}/generate", 12)
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
    port = str(free_port())
    model = ("--model_dir", tiny_model, "--load_format", "dummy", "--multinode_port", port, "--nnodes", "2")
    first = machines([], *model, "--tp", "2", "--port", "0")
    first.wait_for(r"waiting at 127\.0\.0\.1:\d+ for machine 1 of 2")
    flags = changes if "--tp" in changes else ("--tp", "2", *changes)
    other = machines([], *model, *flags, "--node_rank", "1", token=token)
    assert other.process.wait(timeout=20) == 2
    for word in words:
        other.wait_for(re.escape(word), 1)
        first.wait_for(re.escape(word), 5)
