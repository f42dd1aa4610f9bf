"""Machines: the other machines of a node, as machine 0's engine sees them.

Waits until all have dialled and fit, sends them the resolved configuration, then every batch; what their
ranks say goes into the same inbox as what the ranks here say. One thread per machine reads. Runs in the
engine process of machine 0; with one machine it has nothing to do.
"""

import logging
import socket
import threading
from collections.abc import Callable

import msgspec
import zmq

from lightllm import messages
from lightllm.cluster_link import cluster_token
from lightllm.config import Config, SecuritySection, encode_config
from lightllm.engine.machine_link import MachineLink, accept_link, listen_on
from lightllm.errors import ClusterError
from lightllm.rank_messages import FromMachine, MachineAlive, MachineHello, MachineWelcome, RankFailed

logger = logging.getLogger(__name__)

ACCEPT_WAIT_S = 0.2
# Handshakes at the same time, and machines that have joined; more are hung up on.
MAX_DIALERS = 256


class Machines:
    """Links to all machines but this one, by node_rank; empty with one machine.

    Args:
        config: the resolved configuration of machine 0.
        record: what must be equal on all machines, by name.
        context, reply_address: of the inbox to which all ranks push.
    """

    def __init__(
        self,
        config: Config,
        record: dict[str, str],
        context: "zmq.Context[zmq.Socket[bytes]]",
        reply_address: str,
    ) -> None:
        self._config, self._record = config, record
        self._context, self._reply_address = context, reply_address
        self._links: dict[int, MachineLink] = {}
        self._lost: dict[int, str] = {}
        self._lock = threading.Lock()
        self._are_all_there = False
        self._dialers: list[threading.Thread] = []

    def gather(self, waiting: Callable[[str], None]) -> None:
        """Wait until all machines are there, and tell them what to load; `waiting` hears who is missing.

        Raises:
            BindError: the port of the link is taken.
        """
        parallel = self._config.parallel
        if parallel.nnodes == 1:
            return
        token = cluster_token(self._config.security.cluster_token, self._config.environment.home)
        place = f"{parallel.nccl_host}:{parallel.multinode_port}"
        with listen_on(parallel.nccl_host, parallel.multinode_port, "--multinode_port") as listener:
            listener.settimeout(ACCEPT_WAIT_S)
            while not self._complete():
                missing = [rank for rank in range(1, parallel.nnodes) if rank not in self._links]
                waiting(f"waiting at {place} for machine {', '.join(map(str, missing))} of {parallel.nnodes}")
                self._accept(listener, token)
        public = msgspec.structs.replace(self._config, security=SecuritySection())
        meeting = f"{parallel.nccl_host}:{parallel.nccl_port}"
        welcome = MachineWelcome(config=encode_config(public), meeting=meeting)
        self.send(messages.encode(welcome))

    def send(self, body: bytes) -> None:
        """Send to all machines. A link that is lost is reported by its reader."""
        for link in self._links.values():
            try:
                link.send(body)
            except ClusterError as error:
                logger.debug("%s", error)

    def name(self, node_rank: int) -> str:
        """A machine, for messages."""
        link = self._links.get(node_rank)
        return link.peer if link is not None else f"machine {node_rank}"

    def close(self) -> None:
        """End all links; the machines end their ranks."""
        for link in self._links.values():
            link.close()

    def _complete(self) -> bool:
        with self._lock:
            for node_rank, reason in self._lost.items():
                logger.warning("%s; waiting for it again", reason)
                del self._links[node_rank]
            self._lost.clear()
            self._are_all_there = len(self._links) == self._config.parallel.nnodes - 1
            return self._are_all_there

    def _accept(self, listener: socket.socket, token: bytes) -> None:
        try:
            stream, address = listener.accept()
        except TimeoutError:
            return
        self._dialers = [thread for thread in self._dialers if thread.is_alive()]
        if len(self._dialers) >= MAX_DIALERS:
            stream.close()
            return
        # Each in a thread of its own: a dialer that says nothing must not keep the others waiting.
        thread = threading.Thread(target=self._admit, args=(stream, address[0], token), daemon=True)
        self._dialers.append(thread)
        thread.start()

    def _admit(self, stream: socket.socket, address: str, token: bytes) -> None:
        try:
            link, hello = accept_link(stream, token, self._judge)
        except ClusterError as error:
            diff = "".join(f"\n  {line}" for line in getattr(error, "diff", ()))
            logger.error("refused %s: %s%s", address, error, diff)
            return
        with self._lock:
            if self._are_all_there:
                link.close()
                return
            before = self._links.pop(hello.node_rank, None)
            self._lost.pop(hello.node_rank, None)
            self._links[hello.node_rank] = link
        if before is not None:
            before.close()
        logger.info("%s has joined from %s", link.peer, address)
        self._read(link, hello.node_rank)

    def _judge(self, hello: MachineHello) -> tuple[str, ...]:
        nnodes = self._config.parallel.nnodes
        names = sorted({*self._record, *hello.record})
        ours, theirs = self._record, hello.record
        found = [
            f"{name}: {theirs.get(name, 'nothing')} there, {ours.get(name, 'nothing')} on machine 0"
            for name in names
            if ours.get(name) != theirs.get(name)
        ]
        if not 1 <= hello.node_rank < nnodes:
            found.append(f"node_rank: {hello.node_rank} there, expected 1..{nnodes - 1}")
        return tuple(found)

    def _read(self, link: MachineLink, node_rank: int) -> None:
        inbox = self._context.socket(zmq.PUSH)
        inbox.setsockopt(zmq.SNDHWM, 0)
        inbox.setsockopt(zmq.LINGER, 0)
        inbox.connect(self._reply_address)
        decoder = messages.decoder(FromMachine)
        try:
            while True:
                body = link.receive()
                if not isinstance(decoder.decode(body), MachineAlive):
                    inbox.send(body, zmq.NOBLOCK)
        except (ClusterError, msgspec.DecodeError) as error:
            self._note_lost(link, node_rank, str(error), inbox)
        finally:
            inbox.close()
            link.close()

    def _note_lost(self, link: MachineLink, node_rank: int, reason: str, inbox: "zmq.Socket[bytes]") -> None:
        with self._lock:
            if self._links.get(node_rank) is not link:
                return  # it was replaced
            if not self._are_all_there:
                self._lost[node_rank] = reason
                return
        per_machine = self._config.parallel.tp // self._config.parallel.nnodes
        failure = RankFailed(rank=node_rank * per_machine, message=reason)
        inbox.send(messages.encode(failure), zmq.NOBLOCK)
