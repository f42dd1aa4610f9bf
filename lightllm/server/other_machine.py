"""A machine of a node that is not its first: runs workers only, as machine 0 tells it to.

Runs in the process that the user started. Dials machine 0 until it answers, takes its configuration, starts
the workers of this machine and stands between them and machine 0. When either is lost, it ends the workers
and, by `--restart_policy`, begins again.
"""

import contextlib
import logging
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec
import zmq

from lightllm import __version__, messages
from lightllm.cluster_link import LinkRefused, cluster_token
from lightllm.config import Config, decode_config
from lightllm.engine.local_ranks import LocalRanks
from lightllm.engine.machine_link import MachineLink, dial_link
from lightllm.errors import ClusterError, ConfigError
from lightllm.messages import PROTOCOL_VERSION, ScheduledBatch
from lightllm.rank_messages import FromRank, MachineHello, MachineWelcome, RankProgress, RankReady, ToMachine
from lightllm.server.fingerprint import model_fingerprint
from lightllm.server.model_files import ModelDescription, describe_model

logger = logging.getLogger(__name__)

DIAL_INTERVAL_S = 1.0
SAY_INTERVAL_S = 30.0
POLL_MS = 250


class _Stopped(Exception):
    """A signal asks this process to leave."""


def machine_record(config: Config, description: ModelDescription) -> dict[str, str]:
    """What must be equal on all machines of a node, by name."""
    return {
        "version": __version__,
        "protocol": str(PROTOCOL_VERSION),
        "model": f"{description.config.architecture} {model_fingerprint(description)}",
        "--tp": str(config.parallel.tp),
        "--nnodes": str(config.parallel.nnodes),
    }


def follow(config: Config) -> int:
    """Serve machine 0 until stopped; returns the exit code.

    Raises:
        ConfigError: machine 0 refuses this machine; the message shows what differs.
        ModelLoadError: the model is not here.
    """
    parallel = config.parallel
    hello = MachineHello(
        node_rank=parallel.node_rank,
        machine=socket.gethostname(),
        record=machine_record(config, describe_model(config)),
    )
    token = cluster_token(config.security.cluster_token, config.environment.home)
    logger.info(
        "machine %d of %d: runs workers only; HTTP is served by machine 0, %s:%d",
        *(parallel.node_rank, parallel.nnodes, parallel.nccl_host, parallel.multinode_port),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        while True:
            with contextlib.closing(_dial(config, token, hello)) as link:
                try:
                    _serve(config, link)
                except ClusterError as error:
                    logger.error("%s", error)
            if config.engine.restart_policy == "never":
                return 1
            time.sleep(DIAL_INTERVAL_S)
    except _Stopped:
        return 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped


def _dial(config: Config, token: bytes, hello: MachineHello) -> MachineLink:
    """Dial machine 0 until it answers."""
    parallel = config.parallel
    said_s = 0.0
    while True:
        try:
            link = dial_link(parallel.nccl_host, parallel.multinode_port, token, hello)
        except LinkRefused as refusal:
            diff = "".join(f"\n  {line}" for line in refusal.diff)
            place = f"--nccl_host {parallel.nccl_host}, --node_rank {parallel.node_rank}"
            raise ConfigError(f"{place}: machine 0 refused: {refusal.message}{diff}") from refusal
        except (ClusterError, OSError) as error:
            if time.monotonic() - said_s > SAY_INTERVAL_S:
                said_s = time.monotonic()
                place = f"{parallel.nccl_host}:{parallel.multinode_port}"
                logger.info("waiting for machine 0 at %s (%s)", place, error)
            time.sleep(DIAL_INTERVAL_S)
            continue
        logger.info("joined %s; waiting until all %d machines are there", link.peer, parallel.nnodes)
        return link


def _serve(own: Config, link: MachineLink) -> None:
    """From the welcome to the end of the link; raises ClusterError with the reason."""
    decoder = messages.decoder(ToMachine)
    with _directory() as directory, contextlib.ExitStack() as until_the_end:
        ranks: LocalRanks | None = None
        context = zmq.Context(io_threads=1)
        until_the_end.callback(context.destroy, linger=0)
        while True:
            body = link.receive()
            try:
                message = decoder.decode(body)
            except msgspec.DecodeError as error:
                raise ClusterError(f"{link.peer} sent what is no message: {error}") from error
            match message:
                case ScheduledBatch() if ranks is not None:
                    ranks.send(body)
                case MachineWelcome() if ranks is None:
                    inbox, address = _inbox(directory, context)
                    ranks = _start(own, message, link, directory, context, address)
                    until_the_end.callback(ranks.kill)
                    until_the_end.enter_context(_passing_on(inbox, ranks, link))


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="lightllm-"))  # made with mode 0700
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _inbox(directory: Path, context: "zmq.Context[zmq.Socket[bytes]]") -> "tuple[zmq.Socket[bytes], str]":
    """Where the workers of this machine say what they have to say, and its address."""
    inbox = context.socket(zmq.PULL)
    inbox.setsockopt(zmq.RCVHWM, 0)
    address = f"ipc://{directory}/ranks"
    inbox.bind(address)
    return inbox, address


def _start(
    own: Config,
    welcome: MachineWelcome,
    link: MachineLink,
    directory: Path,
    context: "zmq.Context[zmq.Socket[bytes]]",
    address: str,
) -> LocalRanks:
    """Start the workers of this machine by machine 0's configuration; only where things are is our own."""
    theirs, replace = decode_config(welcome.config), msgspec.structs.replace
    config = replace(
        theirs,
        model=replace(theirs.model, model_dir=own.model.model_dir),
        parallel=replace(theirs.parallel, node_rank=own.parallel.node_rank),
        environment=own.environment,
    )
    return LocalRanks(config, directory, context, address, meeting=welcome.meeting, host=link.own_address)


@contextlib.contextmanager
def _passing_on(inbox: "zmq.Socket[bytes]", ranks: LocalRanks, link: MachineLink) -> Iterator[None]:
    """Have a thread pass on what the ranks say; at the end it has ended, and the link with it.

    A zmq socket belongs to one thread at a time: from here on `inbox` is that thread's, which closes it.
    """
    is_over = threading.Event()
    thread = threading.Thread(target=_pass_on, args=(inbox, ranks, link, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        link.close()  # the thread may be waiting for room in it
        thread.join()


def _pass_on(
    inbox: "zmq.Socket[bytes]", ranks: LocalRanks, link: MachineLink, is_over: threading.Event
) -> None:
    """Pass everything that the ranks say to machine 0, and say it for those that no longer can."""
    decoder = messages.decoder(FromRank)
    dead: set[int] = set()
    with inbox:
        try:
            while not is_over.is_set():
                if inbox.poll(POLL_MS):
                    body = inbox.recv()
                    link.send(body)
                    _tell(decoder.decode(body))
                    continue
                for failure in ranks.find_dead():
                    if failure.rank not in dead:
                        dead.add(failure.rank)
                        logger.error("%s", failure.message)
                        link.send(messages.encode(failure))
        except ClusterError:
            return  # the thread that receives hears of it too


def _tell(message: FromRank) -> None:
    match message:
        case RankReady(rank=rank, info=info):
            logger.info("rank %d is ready on %s", rank, info.device)
        case RankProgress(stage=stage, done=0):
            logger.info("%s", stage)
