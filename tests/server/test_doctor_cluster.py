"""What `lightllm doctor` says of token and peers; the peers are real ones."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from lightllm.cluster_link import WRONG_TOKEN
from lightllm.engine.machine_link import accept_link
from lightllm.errors import ClusterError
from lightllm.frontend.directory_client import MasterEntryLink
from lightllm.server import doctor
from lightllm.server.doctor_cluster import check_peers, check_token
from lightllm.server.finding import FAIL, OK, WARN, Case, Finding
from tests.pd.directories import directory
from tests.pd.harness import TOKEN, Cluster, run, until
from tests.server.test_doctor import case, only

OTHER = "another token, long enough"


def read(*argv: str, token: str = TOKEN) -> Case:
    """The case of flags that need not be usable on this machine; the token of tests has spaces."""
    given, _ = doctor.read_flags(argv, {})
    security = msgspec.structs.replace(given.config.security, cluster_token=token)
    return given._replace(config=msgspec.structs.replace(given.config, security=security))


def for_master(port: int, token: str = TOKEN, host: str = "127.0.0.1") -> Case:
    return read("--run_mode", "prefill", "--pd_master_ip", host, "--pd_master_port", str(port), token=token)


def for_directory(port: int, role: str = "decode", token: str = TOKEN) -> Case:
    where = ("--config_server_host", "127.0.0.1", "--config_server_port", str(port))
    return read("--run_mode", role, *where, token=token)


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield unused.getsockname()[1]


# ------------------------------------------------------------ the token


@pytest.mark.parametrize(("mode", "status"), [(0o600, OK), (0o400, OK), (0o640, FAIL), (0o604, FAIL)])
def test_the_mode_of_the_token_file(tmp_path, mode, status):
    path = tmp_path / "cluster_token"
    path.write_text("secret" * 4)
    path.chmod(mode)
    finding = only(check_token, case(LIGHTLLM_HOME=str(tmp_path)))
    assert finding.status == status
    assert str(path) in finding.text
    assert "secret" not in str(finding)
    assert finding.remedy == ("" if status == OK else f"chmod 600 {path}")


def test_a_short_token_is_refused_wherever_it_comes_from(tmp_path):
    (tmp_path / "cluster_token").write_text("short")
    (tmp_path / "cluster_token").chmod(0o600)
    for given in (
        case(LIGHTLLM_HOME=str(tmp_path)),
        case("--cluster_token", "short"),
        case(LIGHTLLM_CLUSTER_TOKEN="short"),
    ):
        finding = only(check_token, given)
        assert (finding.status, "5 bytes, at least 16" in finding.text) == (FAIL, True)
        assert finding.remedy


def test_where_the_token_comes_from():
    assert only(check_token, case("--cluster_token", 20 * "x")).text == "given by --cluster_token"
    assert only(check_token, case(LIGHTLLM_CLUSTER_TOKEN=20 * "x")).text == "given by LIGHTLLM_CLUSTER_TOKEN"


def test_no_token_file_yet(tmp_path):
    environ = {"LIGHTLLM_HOME": str(tmp_path)}
    assert only(check_token, case(**environ)).status == OK
    nearby = ("--run_mode", "prefill", "--pd_master_ip", "127.0.0.1")
    assert only(check_token, doctor.read_flags(nearby, environ)[0]).status == OK
    elsewhere = ("--run_mode", "prefill", "--pd_master_ip", "192.0.2.1")
    finding = only(check_token, doctor.read_flags(elsewhere, environ)[0])
    assert finding.status == WARN
    assert "differ" in finding.text
    assert "copy cluster_token from the other machine" in finding.remedy
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ masters and config_server


def listed(port: int, name: str, at: int) -> MasterEntryLink:
    """A pd_master's entry in a config_server."""
    return MasterEntryLink("127.0.0.1", port, TOKEN.encode(), name, 1, advertised=("127.0.0.1", at))


async def check(given: Case) -> list[Finding]:
    return await asyncio.to_thread(lambda: list(check_peers(given)))


def test_a_master_and_its_token():
    async def test(cluster: Cluster) -> None:
        (finding,) = await check(for_master(cluster.port))
        assert (finding.name, finding.status) == ("pd_master", OK)
        assert finding.text.endswith("answers, and has the same token")
        (finding,) = await check(for_master(cluster.port, token=OTHER))
        assert (finding.status, finding.remedy) == (FAIL, WRONG_TOKEN)
        assert not cluster.router.directory.all()
        (finding,) = await check(for_directory(cluster.port))
        assert finding.status == FAIL
        assert "answers, but is no config_server" in finding.text
        assert "--run_mode" in finding.remedy

    run(test)


def test_a_config_server_and_the_masters_that_it_lists():
    async def test(cluster: Cluster) -> None:
        async with directory() as port:
            found = await check(for_directory(port))
            assert [(f.name, f.status) for f in found] == [("config_server", OK), ("pd_master", WARN)]
            assert f"--config_server_port {port}" in found[1].remedy
            with closed_port() as nobody:
                links = [listed(port, name, at) for name, at in (("one", cluster.port), ("two", nobody))]
                await until(lambda: all(link._dialling.state == "linked" for link in links))
                found = await check(for_directory(port))
                assert [(f.name, f.status) for f in found] == [
                    ("config_server", OK),
                    ("pd_master", OK),
                    ("pd_master", WARN),
                ]
                (finding,) = await check(for_directory(port, "pd_master"))
                assert finding.status == OK
                (finding,) = await check(for_directory(port, token=OTHER))
                assert (finding.status, finding.remedy) == (FAIL, WRONG_TOKEN)
                for link in links:
                    link.stop()

    run(test)


def test_nobody_a_stranger_and_a_wrong_name():
    with closed_port() as port:
        finding = only(check_peers, for_master(port))
        assert (finding.status, "refused" in finding.text.lower()) == (WARN, True)
        assert "firewall" in finding.remedy
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        finding = only(check_peers, for_master(silent.getsockname()[1]))
        assert (finding.status, "no answer in 2 s" in finding.text) == (WARN, True)
        assert time.monotonic() - started < 4
    finding = only(check_peers, for_master(1, host="no-such-host.invalid"))
    assert (finding.status, "correct the name" in finding.remedy) == (FAIL, True)


def test_without_a_token_it_is_enough_that_somebody_answers(tmp_path):
    async def test(cluster: Cluster) -> None:
        flags = (
            "--run_mode",
            "prefill",
            "--pd_master_ip",
            "127.0.0.1",
            "--pd_master_port",
            str(cluster.port),
        )
        given, _ = doctor.read_flags(flags, {"LIGHTLLM_HOME": str(tmp_path)})
        (finding,) = await check(given)
        assert (finding.status, finding.text) == (OK, f"127.0.0.1:{cluster.port} answers")

    run(test)


def test_peers_are_asked_only_when_flags_name_them():
    assert list(check_peers(case())) == []


# ------------------------------------------------------------ machines of one node


def for_machine(rank: int, host: str, port: int, token: str = TOKEN) -> Case:
    flags = ("--tp", "2", "--nnodes", "2", "--node_rank", str(rank), "--device", "cpu")
    return read(*flags, "--nccl_host", host, "--multinode_port", str(port), token=token)


@contextlib.contextmanager
def machine_zero(listener: socket.socket) -> Iterator[list[str]]:
    """Machine 0 while it waits for the others; why it hung up on those that came."""
    refusals: list[str] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                stream, _ = listener.accept()
                try:
                    accept_link(stream, TOKEN.encode(), lambda hello: ())
                except ClusterError as error:
                    refusals.append(getattr(error, "reason", str(error)))

    thread = threading.Thread(target=serve)
    thread.start()
    yield refusals
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_machine_zero_and_its_token():
    with socket.create_server(("127.0.0.1", 0)) as listener, machine_zero(listener) as refusals:
        port = listener.getsockname()[1]
        finding = only(check_peers, for_machine(1, "127.0.0.1", port))
        assert (finding.name, finding.status) == ("machine 0", OK)
        finding = only(check_peers, for_machine(1, "127.0.0.1", port, OTHER))
        assert (finding.status, finding.remedy) == (FAIL, WRONG_TOKEN)
    assert refusals == ["bad_purpose", "bad_token"]
    with closed_port() as port:
        finding = only(check_peers, for_machine(1, "127.0.0.1", port))
        assert (finding.status, "firewall" in finding.remedy) == (WARN, True)


def test_where_machine_zero_waits_for_the_others():
    with closed_port() as port:
        finding = only(check_peers, for_machine(0, "127.0.0.1", port))
        assert (finding.name, finding.status) == ("nccl_host", FAIL)  # the socket of this test has the port
        assert f"port {port} cannot be bound" in finding.text
    finding = only(check_peers, for_machine(0, "127.0.0.1", port))
    assert (finding.status, "only this machine" in finding.text) == (WARN, True)
    finding = only(check_peers, for_machine(0, "192.0.2.1", port))
    assert (finding.status, "no address of this machine" in finding.text) == (FAIL, True)
    assert "--nccl_host" in finding.remedy


def test_each_member_of_an_etcd_is_asked():
    with socket.socket() as listener, socket.socket() as unused:
        for sock in (listener, unused):
            sock.bind(("127.0.0.1", 0))
        listener.listen()
        members = [f"127.0.0.1:{sock.getsockname()[1]}" for sock in (listener, unused)]
        given = read(
            *("--run_mode", "config_server", "--config_server_host", "127.0.0.1"),
            *("--config_server_port", "60088", "--config_server_store", f"etcd://{','.join(members)}"),
        )
        assert [(found.name, found.status) for found in check_peers(given)] == [("etcd", OK), ("etcd", WARN)]
