"""The engine's end of the frontend link: two zmq sockets over ipc in a private directory.

Runs in the engine process, on the loop's thread. Frontends push `ToEngine`, the engine pushes `FromEngine`;
both queues are unbounded because what may enter them is bounded by admission.
"""

import logging
import os
import threading

import msgspec
import zmq

from lightllm import messages
from lightllm.messages import FromEngine, ToEngine

logger = logging.getLogger(__name__)


class ZmqLink:
    """Receives on `address`, sends to `reply_address`; both are ipc:// paths.

    A message that does not decode is dropped and logged: it can only come from a frontend of another version,
    and must not cost the requests of others.
    """

    def __init__(self, address: str, reply_address: str) -> None:
        self._context = zmq.Context(io_threads=1)
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        for socket in (self._inbox, self._outbox):
            socket.setsockopt(zmq.LINGER, 200)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
        self._news = os.eventfd(0, os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._is_closed = False
        self._poller = zmq.Poller()
        for source in (self._inbox, self._news):
            self._poller.register(source, zmq.POLLIN)
        self._inbox.bind(address)
        self._outbox.connect(reply_address)
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = messages.decoder(ToEngine)

    def receive(self, timeout_s: float) -> list[ToEngine]:
        received: list[ToEngine] = []
        if timeout_s > 0:
            ready = dict(self._poller.poll(int(timeout_s * 1000)))
            if self._news in ready:
                os.eventfd_read(self._news)
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
                os.eventfd_write(self._news, 1)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            os.close(self._news)
        self._context.destroy()
