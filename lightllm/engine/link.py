"""The engine's end of the frontend link: two zmq sockets over ipc in a private directory.

Runs in the engine process, on the loop's thread. Frontends push `ToEngine`, the engine pushes `FromEngine`;
both queues are unbounded because what may enter them is bounded by admission.
"""

import contextlib
import logging
import socket
import threading

import msgspec
import zmq

from lightllm import messages
from lightllm.messages import FromEngine, ToEngine

logger = logging.getLogger(__name__)

WAKE_BYTES = 4096


class ZmqLink:
    """Receives on `address`, sends to `reply_address`; both are ipc:// paths.

    A message that does not decode is dropped and logged: it can only come from a frontend of another version,
    and must not cost the requests of others.
    """

    def __init__(self, address: str, reply_address: str) -> None:
        self._context = zmq.Context(io_threads=1)
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        for end in (self._inbox, self._outbox):
            end.setsockopt(zmq.LINGER, 200)
            end.setsockopt(zmq.SNDHWM, 0)
            end.setsockopt(zmq.RCVHWM, 0)
        self._news, self._waker = socket.socketpair()  # an eventfd is Linux only, and laptops are not
        self._news.setblocking(False)
        self._waker.setblocking(False)
        self._lock = threading.Lock()
        self._is_closed = False
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)
        self._poller.register(self._news.fileno(), zmq.POLLIN)
        self._inbox.bind(address)
        self._outbox.connect(reply_address)
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = messages.decoder(ToEngine)

    def receive(self, timeout_s: float) -> list[ToEngine]:
        received: list[ToEngine] = []
        if timeout_s > 0:
            ready = dict(self._poller.poll(int(timeout_s * 1000)))
            if self._news.fileno() in ready:
                self._news.recv(WAKE_BYTES)
            if self._inbox not in ready:
                return received
        while True:
            try:
                data = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return received
            try:
                received.append(self._decoder.decode(data))
            except msgspec.DecodeError as error:
                logger.error("dropped a message from the frontend that does not decode: %s", error)

    def send(self, message: FromEngine) -> None:
        self._outbox.send(messages.encode(message), zmq.NOBLOCK)

    def wake(self) -> None:
        """End a `receive` that waits, or else the next one that would; any thread may call this."""
        with self._lock:
            if not self._is_closed:
                with contextlib.suppress(BlockingIOError):  # so full that it will be woken anyway
                    self._waker.send(b"\0")

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._news.close()
            self._waker.close()
        self._context.destroy()
