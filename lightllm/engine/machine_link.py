"""MachineLink: one authenticated TCP connection between machine 0 of a node and another of its machines.

Blocking sockets and one thread for the heartbeat; frames are sealed by cluster_link. A peer from which
nothing has come for SILENCE_LIMIT_S counts as lost, whatever TCP says. Runs in the engine process of machine
0 and in the one process that the other machines have beside their workers.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from lightllm import messages
from lightllm.cluster_link import (
    HANDSHAKE_LIMIT_S,
    MAX_FRAME_BYTES,
    Acceptor,
    Dialer,
    LinkRefused,
    Seal,
    StreamFrames,
    new_epoch,
)
from lightllm.errors import BindError, ClusterError
from lightllm.rank_messages import MachineAlive, MachineHello

PURPOSE = "tensor parallel"
SILENCE_LIMIT_S = 6.0
ALIVE_INTERVAL_S = 1.0
RECEIVE_BYTES = 1 << 20


class MachineLink:
    """A connection whose handshake has succeeded.

    Args:
        stream: the connection; owned from here on.
        frames: what has been received and not taken yet.
        seal: of this side.
        peer: the other machine, for messages.
    """

    def __init__(self, stream: socket.socket, frames: StreamFrames, seal: Seal, peer: str) -> None:
        self.peer = peer
        self._stream, self._frames, self._seal = stream, frames, seal
        self._frames.limit_bytes = MAX_FRAME_BYTES
        self._lock = threading.Lock()
        self._closed = threading.Event()
        stream.settimeout(SILENCE_LIMIT_S)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._beat, name="machine-alive", daemon=True).start()

    @property
    def own_address(self) -> str:
        """The address of this machine on this connection."""
        return str(self._stream.getsockname()[0])

    def send(self, body: bytes) -> None:
        """Send one encoded message; any thread may. Waits only while the peer takes nothing.

        Raises:
            ClusterError: the link is lost.
        """
        with self._lock:
            try:
                self._stream.sendall(StreamFrames.wrap(self._seal.seal(body)))
            except OSError as error:
                raise ClusterError(f"the link to {self.peer} is lost: {error}") from error

    def receive(self) -> bytes:
        """Wait for the next message, heartbeats included; one thread only.

        Raises:
            ClusterError: the link is lost, or a frame is not the peer's next one.
        """
        return self._seal.open(_next_frame(self._stream, self._frames, self.peer))

    def close(self) -> None:
        """End it; a thread that waits in `receive` hears of it."""
        self._closed.set()
        try:
            self._stream.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster
        self._stream.close()

    def _beat(self) -> None:
        alive = messages.encode(MachineAlive())
        while not self._closed.wait(ALIVE_INTERVAL_S):
            try:
                self.send(alive)
            except ClusterError:
                return  # whoever receives hears it too


def listen_on(host: str, port: int, flag: str) -> socket.socket:
    """Listen on an address of machine 0.

    Args:
        flag: where the port comes from.

    Raises:
        BindError: the address is not of this machine, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise BindError(
            f"cannot listen on --nccl_host {host}, {flag} {port}: {error.strerror or error}; "
            "--nccl_host must be an address of machine 0, and the port a free one"
        ) from error
    return listener


def accept_link(
    stream: socket.socket, token: bytes, judge: Callable[[MachineHello], tuple[str, ...]]
) -> tuple[MachineLink, MachineHello]:
    """Machine 0's side of the handshake.

    Args:
        judge: names what does not fit, one line each.

    Raises:
        ClusterError: the dialer does not know the token, does not fit, or is none of ours. It was told.
    """
    until_s = time.monotonic() + HANDSHAKE_LIMIT_S
    frames = StreamFrames()
    acceptor = Acceptor(token, PURPOSE)
    try:
        stream.settimeout(HANDSHAKE_LIMIT_S)
        stream.sendall(StreamFrames.wrap(acceptor.challenge()))
        greeting = acceptor.take_hello(_next_frame(stream, frames, "the dialer", until_s))
        hello: MachineHello = messages.decode(greeting.detail, MachineHello)
        problems = judge(hello)
        if problems:
            text = f"machine {hello.node_rank} ({hello.machine}) cannot join"
            raise acceptor.refuse("mismatch", text, problems)
        frame, seal = acceptor.welcome("machine-0", new_epoch())
        stream.sendall(StreamFrames.wrap(frame))
    except LinkRefused as refusal:
        with contextlib.suppress(OSError):  # it may not wait for our reasons
            stream.sendall(StreamFrames.wrap(refusal.frame))
        stream.close()
        raise
    except ClusterError:
        stream.close()
        raise
    except (OSError, ValueError) as error:
        stream.close()
        raise ClusterError(f"the dialer did not finish its handshake: {error}") from error
    return MachineLink(stream, frames, seal, f"machine {hello.node_rank} ({hello.machine})"), hello


def dial_link(host: str, port: int, token: bytes, hello: MachineHello) -> MachineLink:
    """The other machines' side.

    Raises:
        LinkRefused: machine 0 will not have us, or does not know the token.
        ClusterError, OSError: it is not there, or not yet.
    """
    stream = socket.create_connection((host, port), timeout=HANDSHAKE_LIMIT_S)
    frames = StreamFrames()
    dialer = Dialer(token, PURPOSE, f"machine-{hello.node_rank}", new_epoch(), messages.encode(hello))
    peer = f"machine 0 ({host}:{port})"
    until_s = time.monotonic() + HANDSHAKE_LIMIT_S
    try:
        answer = dialer.answer(_next_frame(stream, frames, peer, until_s))
        stream.sendall(StreamFrames.wrap(answer))
        _, seal = dialer.finish(_next_frame(stream, frames, peer, until_s))
    except (ClusterError, OSError):
        stream.close()
        raise
    return MachineLink(stream, frames, seal, peer)


def _next_frame(
    stream: socket.socket, frames: StreamFrames, peer: str, until_s: float | None = None
) -> bytes:
    """Wait for a frame; `until_s` bounds all of it, else the stream's time-out each piece of it."""
    while (frame := frames.next_frame()) is None:
        if until_s is not None:
            stream.settimeout(max(0.001, until_s - time.monotonic()))
        try:
            data = stream.recv(RECEIVE_BYTES)
        except TimeoutError as error:
            limit_s = HANDSHAKE_LIMIT_S if until_s is not None else SILENCE_LIMIT_S
            raise ClusterError(f"{peer} has not been heard of for {limit_s:g} s") from error
        except OSError as error:
            raise ClusterError(f"the link to {peer} is lost: {error}") from error
        if not data:
            raise ClusterError(f"{peer} has closed its link")
        frames.feed(data)
    return frame
