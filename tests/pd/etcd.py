"""A real etcd for tests that need one; they are skipped where its program is not installed."""

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

BINARY = shutil.which("etcd")
needs_etcd = pytest.mark.skipif(BINARY is None, reason="no etcd in PATH (Debian: etcd-server)")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Etcd:
    """An etcd of one member that can be killed, and started again with its data or without."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.peer_port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        assert BINARY is not None
        own, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.peer_port}"
        urls = {
            "listen-client-urls": own,
            "advertise-client-urls": own,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"one={peer}",
        }
        flags = [f"--{name}={url}" for name, url in urls.items()]
        with (self.folder / "log").open("ab") as log:
            command = [BINARY, "--name=one", f"--data-dir={self.folder}/data", "--logger=zap", *flags]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 20
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{own}/health", timeout=2).json().get("health") == "true":
                    return
            assert time.monotonic() < end, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.05)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def lose_data(self) -> None:
        shutil.rmtree(self.folder / "data")
