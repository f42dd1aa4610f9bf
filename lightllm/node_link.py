"""A link between two nodes over a WebSocket: handshake, sealed messages, heartbeats, loss.

L0; runs in event loops of frontends and of the config_server. What is sent is up to the owner of the link,
who gets every message by a plain call. A peer that is silent for three heartbeats is lost, whether it died,
froze or fell off the network. Not reconnected from here: `Dialling` tries for ever and makes a new link each
time.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from lightllm import messages, web_socket
from lightllm.cluster_link import (
    HANDSHAKE_LIMIT_S,
    MAX_FRAME_BYTES,
    MAX_HANDSHAKE_BYTES,
    Acceptor,
    Dialer,
    Hello,
    LinkBroken,
    LinkRefused,
    Seal,
    Welcome,
)
from lightllm.errors import ClusterError
from lightllm.web_socket import WebSocket

logger = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
LOST_AFTER_S = 3 * HEARTBEAT_S
FIRST_RETRY_S = 0.2
MAX_RETRY_S = 5.0
REFUSED_RETRY_S = 5.0


class LinkOwner(Protocol):
    """Whom a link serves."""

    def on_open(self, link: "Link", welcome: Welcome | None) -> None:
        """The handshake is done; `welcome` is the acceptor's answer, None at the acceptor itself."""
        ...

    def on_body(self, link: "Link", body: bytes) -> None:
        """One message; raise `msgspec.DecodeError` or `ClusterError` to close the link."""
        ...

    def on_closed(self, link: "Link", reason: str) -> None:
        """The link is gone; called only after `on_open`."""
        ...

    def heartbeat(self, link: "Link") -> msgspec.Struct:
        """What to send every HEARTBEAT_S."""
        ...


class Link:
    """One link, from its first frame to its end. Use `accept` or `Dialling`."""

    def __init__(self, socket: WebSocket, owner: LinkOwner) -> None:
        self.socket = socket
        self._owner = owner
        self._seal: Seal | None = None
        self._loop = asyncio.get_running_loop()
        self._heard_s = time.monotonic()
        self._closed_with = ""
        self._timer = self._loop.call_later(HANDSHAKE_LIMIT_S, self._handshake_is_late)
        socket.on_closed = self._on_closed

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        return self._seal is not None and not self.socket.is_closed

    def send(self, message: msgspec.Struct) -> None:
        """Send one message; nothing happens once the link is closed."""
        if self._seal is not None and not self.socket.is_closed:
            self.socket.send(self._seal.seal(messages.encode(message)))

    def close(self, reason: str) -> None:
        """Close after what was sent has left."""
        self._closed_with = self._closed_with or reason
        self.socket.close(reason)

    def abort(self, reason: str) -> None:
        """Cut at once."""
        self._closed_with = self._closed_with or reason
        self.socket.abort(reason)

    def open(self, seal: Seal, welcome: Welcome | None) -> None:
        """The handshake is done: from now on sealed messages and heartbeats."""
        self._seal = seal
        self.socket.limit_bytes = MAX_FRAME_BYTES
        self.socket.on_message = self._on_message
        self._timer.cancel()
        self._timer = self._loop.call_later(HEARTBEAT_S, self._beat)
        self._owner.on_open(self, welcome)

    def _on_message(self, frame: bytes) -> None:
        assert self._seal is not None
        self._heard_s = time.monotonic()
        try:
            self._owner.on_body(self, self._seal.open(frame))
        except (LinkBroken, ClusterError, msgspec.DecodeError) as error:
            self.abort(f"a message that cannot be taken: {error}")

    def _beat(self) -> None:
        silence_s = time.monotonic() - self._heard_s
        if silence_s > LOST_AFTER_S:
            self.abort(f"silent for {silence_s:.0f} s")
            return
        self.send(self._owner.heartbeat(self))
        self._timer = self._loop.call_later(HEARTBEAT_S, self._beat)

    def _handshake_is_late(self) -> None:
        self.abort(f"no handshake within {HANDSHAKE_LIMIT_S:.0f} s")

    def _on_closed(self, reason: str) -> None:
        self._timer.cancel()
        was_open, self._seal = self._seal is not None, None
        if was_open:
            self._owner.on_closed(self, self._closed_with or reason)


def accept(
    socket: WebSocket,
    acceptor: Acceptor,
    owner: LinkOwner,
    greet: Callable[[Hello, Link], tuple[bytes, Seal]],
) -> None:
    """Begin the handshake with a node that has dialled.

    Args:
        greet: called with a hello that proved the token; makes the welcome (`Acceptor.welcome`) or raises
            LinkRefused.
    """
    link = Link(socket, owner)

    def on_hello(frame: bytes) -> None:
        try:
            hello = acceptor.take_hello(frame)
            welcome, seal = greet(hello, link)
        except LinkRefused as refusal:
            logger.warning("refused a link: %s", refusal.message)
            if refusal.frame:
                socket.send(refusal.frame)
            socket.close(refusal.reason)
            return
        socket.send(welcome)
        link.open(seal, None)

    socket.on_message = on_hello
    socket.send(acceptor.challenge())


class Dialling:
    """Keeps one link to an acceptor, for ever, with back-off.

    Args:
        make_dialer: one handshake's state, anew for each attempt.
        name: of the peer, for the log.

    Attributes:
        state: one line for people: what the link does now.
        refusal: the last refusal, None while there was none since the last success.
    """

    def __init__(
        self, host: str, port: int, path: str, owner: LinkOwner, make_dialer: Callable[[], Dialer], name: str
    ) -> None:
        self.host = host
        self.port = port
        self.path = path
        self.state = "not yet dialled"
        self.refusal: LinkRefused | None = None
        self._owner = owner
        self._make_dialer = make_dialer
        self._name = name
        self._link: Link | None = None
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"dial-{name}")

    def stop(self, reason: str) -> None:
        """Close the link and dial no more."""
        self._task.cancel()
        if self._link is not None:
            self._link.close(reason)

    async def _run(self) -> None:
        delay_s, logged = FIRST_RETRY_S, ""
        while True:
            closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            reason = ""
            try:
                await self._attempt(closed)
                delay_s, logged, self.refusal = FIRST_RETRY_S, "", None
                self.state = "linked"
                logger.info("linked to the %s at %s:%d", self._name, self.host, self.port)
                reason = await closed
            except LinkRefused as refusal:
                self.refusal = refusal
                lines = "".join(f"\n  {line}" for line in refusal.diff)
                reason, delay_s = f"refused: {refusal.message}{lines}", REFUSED_RETRY_S
            except (OSError, TimeoutError, ClusterError) as error:
                reason = f"cannot be reached: {error or 'timed out'}"
            self._link = None
            self.state = reason
            if reason != logged:
                logger.warning("%s at %s:%d: %s; trying again", self._name, self.host, self.port, reason)
                logged = reason
            # Spread, so that the nodes of a master that comes back do not all arrive at once.
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(MAX_RETRY_S, 2 * delay_s)

    async def _attempt(self, closed: "asyncio.Future[str]") -> None:
        """One connection up to the end of the handshake."""
        dialer = self._make_dialer()  # before there is a connection: it may have nothing to offer
        socket = await web_socket.connect(self.host, self.port, self.path, MAX_HANDSHAKE_BYTES)
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        link = self._link = Link(socket, self._owner)
        link_closed = socket.on_closed

        def on_closed(reason: str) -> None:
            link_closed(reason)
            if not opened.done():
                opened.set_exception(ClusterError(reason))
            elif not closed.done():
                closed.set_result(reason)

        def fail(error: LinkRefused) -> None:
            if not opened.done():
                opened.set_exception(error)
            link.abort(error.message)

        def on_welcome(frame: bytes) -> None:
            try:
                welcome, seal = dialer.finish(frame)
            except LinkRefused as error:
                fail(error)
                return
            opened.set_result(None)
            link.open(seal, welcome)

        def on_challenge(frame: bytes) -> None:
            try:
                answer = dialer.answer(frame)
            except LinkRefused as error:
                fail(error)
                return
            socket.on_message = on_welcome
            socket.send(answer)

        socket.on_closed = on_closed
        socket.on_message = on_challenge
        await opened
