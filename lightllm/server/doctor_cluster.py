"""What `lightllm doctor` finds out about the cluster: its token, and the other nodes that flags name.

Nodes are really spoken to: the handshake tells whether they are what the flags say, and have the same token.
It is broken off before anything is registered; the peer logs a refused link of purpose "doctor". Changes
nothing: a token file that does not exist is not made.
"""

import asyncio
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lightllm import messages, web_socket
from lightllm.addresses import is_loopback, split_addresses
from lightllm.cluster_link import (
    MAX_FRAME_BYTES,
    MIN_TOKEN_BYTES,
    TOKEN_FILE,
    Dialer,
    LinkBroken,
    LinkRefused,
    StreamFrames,
    cluster_token,
    new_epoch,
)
from lightllm.cluster_messages import REGISTER_PATH, WATCH_PATH, WATCH_PURPOSE, MasterList, ToWatcher
from lightllm.config import Config
from lightllm.config_server.store import ETCD, MEMORY
from lightllm.errors import ClusterError, ConfigError
from lightllm.server import machine
from lightllm.server.finding import FAIL, OK, WARN, Case, Finding

PURPOSE = "doctor"
LIMIT_S = 2.0
LINKED_ROLES = ("prefill", "decode", "pd_master", "config_server")
START_IT = "start it, and let a firewall pass this port"


# ---------------------------------------------------------------- the token


def check_token(case: Case) -> Iterator[Finding]:
    """Where the cluster token comes from, and that nobody else can read it."""
    config = case.config
    given = config.security.cluster_token
    if given:
        source = f"given by {case.spelled.get('cluster_token', '--cluster_token')}"
        yield _length(given, source, "give a longer one, the same on all machines")
        return
    path = Path(config.environment.home).expanduser() / TOKEN_FILE
    try:
        status = path.stat()
    except FileNotFoundError:
        yield _no_file(config, path)
        return
    except OSError as error:
        yield Finding("cluster token", FAIL, f"{path}: {error.strerror}", "check the folder's permissions")
        return
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.getuid():
        yield Finding("cluster token", FAIL, f"{path} belongs to another user", "set LIGHTLLM_HOME")
    elif mode & 0o077:
        yield Finding("cluster token", FAIL, f"{path} has mode {mode:04o}, allowed 0600", f"chmod 600 {path}")
    else:
        text = path.read_text("ascii", errors="replace")
        yield _length(text, f"{path}, mode {mode:04o}", "delete it, and copy that of another machine")


def _length(text: str, source: str, remedy: str) -> Finding:
    num_bytes = len(text.strip().encode())
    if num_bytes >= MIN_TOKEN_BYTES:
        return Finding("cluster token", OK, source)
    shown = f"{source}: has {num_bytes} bytes, at least {MIN_TOKEN_BYTES} are needed"
    return Finding("cluster token", FAIL, shown, remedy)


def _no_file(config: Config, path: Path) -> Finding:
    """The first node makes one, which others on this machine find; those elsewhere do not."""
    is_linked = config.server.run_mode in LINKED_ROLES or config.parallel.nnodes > 1
    text = f"{path} will be made when it is first needed"
    if not is_linked or all(is_loopback(host) for _, host, _ in _peers(config)):
        return Finding("cluster token", OK, text)
    remedy = f"copy {TOKEN_FILE} from the other machine, or set LIGHTLLM_CLUSTER_TOKEN to the same on all"
    return Finding("cluster token", WARN, f"{text}, and differ from that of the other machines", remedy)


def _known_token(config: Config) -> bytes | None:
    """The token that the server would use; None if there is none, or not yet."""
    path = Path(config.environment.home).expanduser() / TOKEN_FILE
    if config.security.cluster_token is None and not path.exists():
        return None
    try:
        return cluster_token(config.security.cluster_token, str(path.parent))
    except ConfigError:
        return None  # check_token says why


# ---------------------------------------------------------------- other nodes


def check_peers(case: Case) -> Iterator[Finding]:
    """Other nodes that the flags name. One that is not up yet is a warning only: nodes wait for others."""
    config = case.config
    token = _known_token(config)
    for name, host, port in _peers(config):
        if name == "machine 0":
            yield _machine_zero(host, port, token)
        elif name == "etcd":
            yield _etcd(host, port)
        else:
            yield from asyncio.run(_node(config, name, host, port, token))
    if config.parallel.nnodes > 1 and config.parallel.node_rank == 0:
        yield _meeting_point(config)


def _peers(config: Config) -> list[tuple[str, str, int]]:
    """(what it is, host, port) of each node that this one would dial."""
    role, directory, parallel = config.server.run_mode, config.config_server, config.parallel
    peers: list[tuple[str, str | None, int | None]] = []
    if role in ("prefill", "decode"):
        peers.append(("pd_master", config.pd.pd_master_ip, config.pd.pd_master_port))
    if role != "config_server":
        peers.append(("config_server", directory.config_server_host, directory.config_server_port))
    elif directory.config_server_store != MEMORY:
        addresses = split_addresses(directory.config_server_store.removeprefix(ETCD))
        peers += [("etcd", host, port) for host, port in addresses]
    if parallel.node_rank:
        peers.append(("machine 0", parallel.nccl_host, parallel.multinode_port))
    return [(name, host, port) for name, host, port in peers if host and port]


async def _node(config: Config, name: str, host: str, port: int, token: bytes | None) -> list[Finding]:
    """A pd_master; or a config_server and, for those who look for their masters there, all that it lists."""
    path, purpose = (REGISTER_PATH, PURPOSE) if name == "pd_master" else (WATCH_PATH, WATCH_PURPOSE)
    where = f"{host}:{port}"
    try:
        async with asyncio.timeout(LIMIT_S):
            masters = await _shake_hands(host, port, path, purpose, token)
    except (LinkBroken, msgspec.DecodeError) as error:
        text = f"{where} does not speak the protocol of this version: {error}"
        return [Finding(name, FAIL, text, "run equal versions on all nodes")]
    except (OSError, TimeoutError, ClusterError) as error:
        return [_fault(name, where, error)]
    found = [Finding(name, OK, f"{where} answers{', and has the same token' if token else ''}")]
    if masters is None or config.server.run_mode not in ("prefill", "decode"):
        return found
    if not masters.pd_masters:
        remedy = f"start one with --config_server_host {host} --config_server_port {port}"
        found.append(Finding("pd_master", WARN, f"{where} lists none yet", remedy))
    for entry in masters.pd_masters:
        found += await _node(config, "pd_master", entry.host, entry.port, token)
    return found


async def _shake_hands(
    host: str, port: int, path: str, purpose: str, token: bytes | None
) -> MasterList | None:
    """Until both sides have proved the token, or without one until somebody answers; the list if one comes.

    Raises:
        OSError, TimeoutError, ClusterError, LinkRefused: as the words say.
    """
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    peer = await web_socket.connect(host, port, path, MAX_FRAME_BYTES)
    try:
        peer.on_message = heard.put_nowait
        peer.on_closed = lambda reason: heard.put_nowait(b"")  # which is no frame
        if token is None:
            return None
        dialer = Dialer(token, purpose, "doctor", new_epoch())
        peer.send(dialer.answer(await heard.get()))
        try:
            _, seal = dialer.finish(await heard.get())
        except LinkRefused as refusal:
            if refusal.reason == "bad_purpose":  # it has looked at our proof before
                return None
            raise
        while True:
            message: ToWatcher = messages.decode(seal.open(await heard.get()), ToWatcher)
            if isinstance(message, MasterList):
                return message
    finally:
        peer.abort("the doctor leaves")


def _fault(name: str, where: str, error: Exception) -> Finding:
    match error:
        case LinkRefused(reason="bad_token"):
            return Finding(name, FAIL, f"{where} has another cluster token", error.message)
        case LinkRefused(reason="bad_protocol"):
            return Finding(name, FAIL, f"{where}: {error.message}", "run equal versions on all nodes")
        case web_socket.WebSocketRefused():
            text = f"{where} answers, but is no {name}: {error.message}"
            return Finding(name, FAIL, text, "check the address, and the --run_mode there")
        case socket.gaierror(strerror=text):
            return Finding(name, FAIL, f"{where}: {text}", "correct the name or use an address")
        case OSError(errno=int() as number):
            return Finding(name, WARN, f"{where}: {os.strerror(number)}", START_IT)
        case TimeoutError():
            return Finding(name, WARN, f"{where}: no answer in {LIMIT_S:g} s", START_IT)
    return Finding(name, FAIL, f"{where}: {error}", "see the log there")


def _etcd(host: str, port: int) -> Finding:
    """A member of the store; whether it serves is found out by the config_server when it starts."""
    try:
        with socket.create_connection((host, port), timeout=LIMIT_S):
            return Finding("etcd", OK, f"{host}:{port} answers")
    except OSError as error:
        return _fault("etcd", f"{host}:{port}", error)


# ---------------------------------------------------------------- machines of one node


def _machine_zero(host: str, port: int, token: bytes | None) -> Finding:
    """The machine that all others dial; it listens only until all are there."""
    name, where = "machine 0", f"--nccl_host {host}, --multinode_port {port}"
    try:
        _dial_machine(host, port, token)
    except (OSError, TimeoutError, ClusterError) as error:
        return _fault(name, where, error)
    return Finding(name, OK, f"{where} answers{', and has the same token' if token else ''}")


def _dial_machine(host: str, port: int, token: bytes | None) -> None:
    until_s = time.monotonic() + LIMIT_S
    frames = StreamFrames()
    with socket.create_connection((host, port), timeout=LIMIT_S) as peer:

        def receive() -> bytes:
            while (frame := frames.next_frame()) is None:
                peer.settimeout(max(0.001, until_s - time.monotonic()))
                data = peer.recv(65536)
                if not data:
                    raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
                frames.feed(data)
            return frame

        if token is None:
            return
        dialer = Dialer(token, PURPOSE, "doctor", new_epoch())
        peer.sendall(StreamFrames.wrap(dialer.answer(receive())))
        try:
            dialer.finish(receive())
        except LinkRefused as refusal:
            if refusal.reason != "bad_purpose":
                raise


def _meeting_point(config: Config) -> Finding:
    """What the other machines dial must be an address of this one, with both ports free."""
    parallel, name = config.parallel, "nccl_host"
    host, ports = parallel.nccl_host, (parallel.nccl_port, parallel.multinode_port)
    if not machine.is_port_free(host, 0):
        text = f"{host} is no address of this machine, which is --node_rank 0"
        return Finding(name, FAIL, text, "give all machines --nccl_host with an address of this one")
    taken = [str(port) for port in ports if port and not machine.is_port_free(host, port)]
    if taken:
        text = f"{host}: port {' and '.join(taken)} cannot be bound"
        return Finding(name, FAIL, text, "choose another --nccl_port (and --multinode_port) on all machines")
    shown = f"{host}, ports {ports[0]} and {ports[1]}, can be bound"
    if is_loopback(host):
        remedy = "give an address that the other machines reach, unless all of them are this one"
        return Finding(name, WARN, f"{shown}, but only this machine reaches it", remedy)
    return Finding(name, OK, f"{shown}; let a firewall pass them")
