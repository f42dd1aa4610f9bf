"""The cluster of deploy/compose/pd.yaml, its containers as processes of this machine."""

import concurrent.futures
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.manifests import Container, containers
from tests.e2e.conftest import Server
from tests.pd.etcd import free_port

KEY = "a-key-of-clients"
SMALL = {"LIGHTLLM_MAX_TOTAL_TOKEN_NUM": "2048", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_cluster_of_compose_serves(tmp_path: Path) -> None:
    found = {c.names[0]: c for c in containers() if c.place.startswith("compose/pd.yaml:")}
    (tmp_path / "cluster_token").write_text("a-token-of-the-cluster\n")
    (tmp_path / "api_key").write_text(KEY + "\n")
    directory_port = str(free_port())

    def begin(container: Container) -> Server:
        """On this machine all containers have one address, so that their ports must differ."""
        args = [
            a.replace("config-server", "127.0.0.1").replace("--port=8000", "--port=0") for a in container.args
        ]
        env = {k: v.replace("/run/secrets", str(tmp_path)) for k, v in container.environ.items()}
        env |= {
            "LIGHTLLM_CONFIG_SERVER_PORT": directory_port,
            "LIGHTLLM_HOME": str(tmp_path / "home"),
            **SMALL,
        }
        return Server(*args, env=env, port=None)

    servers = [begin(found.pop("config-server"))]
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            others = dict(zip(found, pool.map(begin, found.values()), strict=True))
        servers += others.values()
        assert not (tmp_path / "home").exists()  # no token of its own was made
        for name in ("pd-master-1", "pd-master-2"):
            master = others[name]
            master.wait_until(lambda master=master: is_well(found["pd-master-1"], master), 60)
            assert master.client.post("/generate", json={"inputs": "x"}).status_code == 401
            master.client.headers["authorization"] = f"Bearer {KEY}"
            assert master.generate("hello", max_new_tokens=8)["count_output_tokens"] == 8
        assert is_well(found["prefill"], others["prefill"])
    finally:
        codes = [server.stop() for server in reversed(servers)]
    assert codes == [0] * len(codes)


def is_well(container: Container, server: Server) -> bool:
    """Whether the container's own health check says so."""
    program, *rest = container.check
    assert program == "python"
    port = server.url.rpartition(":")[2]
    command = [sys.executable, *(text.replace(":8000/", f":{port}/") for text in rest)]
    assert f":{port}/readiness" in json.dumps(command)
    return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
