"""A full disk: the log and, once, the cluster token go there. Neither may take a server down silently."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("e2e")]

COMMAND = (sys.executable, "-m", "lightllm.server.api_server", "--port", "0")


def test_a_log_that_cannot_be_written_costs_nobody_an_answer(tiny_model: str) -> None:
    flags = ("--model_dir", tiny_model, "--load_format", "dummy")
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([*COMMAND, *flags], stdout=subprocess.PIPE, stderr=full, text=True)
    try:
        assert process.stdout is not None
        found = re.match(r"ready: (http://\S+) ", process.stdout.readline())
        assert found is not None
        with httpx.Client(base_url=found[1], timeout=30) as client:
            body = {"inputs": "Hello", "parameters": {"max_new_tokens": 5, "ignore_eos": True}}
            replies = [client.post("/generate", json=body) for _ in range(5)]
            assert [reply.json()["count_output_tokens"] for reply in replies] == [5] * 5
            assert client.post("/generate", json={"inputs": ""}).status_code == 400
            assert client.get("/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_token_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("this user may not mount a small disk")
    options = ("-t", "tmpfs", "-o", "size=4k,nr_inodes=1", "tmpfs")
    if subprocess.run(["mount", *options, str(tmp_path)], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let a small disk be mounted")
    try:
        done = subprocess.run(
            [*COMMAND, "--run_mode", "pd_master"],
            env={**os.environ, "LIGHTLLM_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the cluster token file")
    assert "No space left on device" in last
    assert not list(tmp_path.iterdir())
