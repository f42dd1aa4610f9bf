"""Two config_servers over one etcd, as a user starts them: traffic needs neither them nor the etcd."""

import concurrent.futures
import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.e2e.conftest import Server
from tests.pd.etcd import Etcd, free_port, needs_etcd


@needs_etcd
def test_all_of_the_directory_may_die_under_traffic(tmp_path: Path, tiny_model: str) -> None:
    etcd = Etcd(tmp_path)
    env = {"LIGHTLLM_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    model = ("--model_dir", tiny_model, "--load_format", "dummy", "--max_total_token_num", "2048")
    ports = [free_port(), free_port()]
    store = ("--config_server_store", f"etcd://127.0.0.1:{etcd.port}")

    def begin(role: str, at: int, *flags: str) -> Server:
        where = ("--config_server_host", "127.0.0.1", "--config_server_port", str(ports[at]))
        port = None if role == "config_server" else 0
        return Server("--run_mode", role, *where, *flags, env=env, port=port)

    servers = [begin("config_server", 0, *store), begin("config_server", 1, *store)]
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            roles = (("pd_master", 0), ("pd_master", 1), ("prefill", 0), ("decode", 1))
            servers += pool.map(lambda item: begin(*item, *model), roles)
        masters = servers[2:4]
        for master in masters:
            master.wait_until(has_nodes(master, 2), 30)
        # Everything that knows where anybody is.
        dead = servers.pop(0)
        os.kill(dead.children()["config_server"], signal.SIGKILL)
        os.kill(dead.process.pid, signal.SIGKILL)
        dead.stop()
        etcd.kill()
        for master in masters:
            assert master.generate("hello", max_new_tokens=8)["count_output_tokens"] == 8
        # It comes back without its data; a node that starts now finds both masters.
        etcd.lose_data()
        etcd.start()
        servers.insert(0, begin("config_server", 0, *store))
        servers.append(begin("decode", 0, *model))
        for master in masters:
            master.wait_until(has_nodes(master, 3), 30)
    finally:
        codes = [server.stop() for server in reversed(servers)]
        etcd.kill()
    assert codes == [0] * len(codes)


def has_nodes(master: Server, count: int) -> Callable[[], bool]:
    def has() -> bool:
        page = master.client.get("/cluster", headers={"accept": "application/json"}).json()
        return len(page["nodes"]) == count and master.client.get("/readiness").status_code == 200

    return has
