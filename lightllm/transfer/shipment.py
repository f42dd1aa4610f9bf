"""Shipment: the sender's end of one transfer, in a thread of its own.

Dials the receiver, offers lanes, then packs and announces each order's blocks as they come, so that the
beginning of a prompt is on its way while the rest of it is computed. Reads slots only while it holds them.
"""

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from lightllm.cluster_link import Dialer, LinkBroken, LinkRefused
from lightllm.device.base import Moment
from lightllm.errors import KVTransferError
from lightllm.messages import KVLayout, KVTarget, KVTransferOrder
from lightllm.transfer import frames
from lightllm.transfer.base import Hold, Limits, fault_of
from lightllm.transfer.channel import Channel
from lightllm.transfer.frames import (
    Accepted,
    Ack,
    Alive,
    Block,
    Choice,
    Complete,
    LaneOffer,
    Opening,
    Rejected,
)
from lightllm.transfer.lane import WINDOW, Lanes, SendingEnd
from lightllm.transfer.plan import blocks, digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What all transfers of this node have in common.

    Attributes:
        rank: of those that share the model; each moves its part of the KV to and from the same rank there.
        lanes: those that it has open.
        epoch: of this life of the KV link.
    """

    layout: KVLayout
    token: bytes = field(repr=False)
    epoch: int
    lanes: Lanes
    limits: Limits
    rank: int = 0


class Shipment:
    """Sends the KV of one request.

    Args:
        first: its first order.
        hold: on the slots of all its orders.
    """

    def __init__(self, node: Node, first: KVTransferOrder, hold: Hold) -> None:
        assert first.target is not None, "an order to send names its target"
        self.hold = hold
        self._node = node
        self._target: KVTarget = first.target
        self._start = first.start
        self._orders: deque[tuple[KVTransferOrder, Moment]] = deque()
        self._first_token_id: int | None = None
        self._news = os.eventfd(0, os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._is_closed = False
        self._chunks: list[tuple[int, int]] = []
        self._num_unacknowledged = 0

    def add(self, order: KVTransferOrder, written: Moment) -> None:
        """Ship this, too, once the device is past that moment; called in the order of positions."""
        with self._lock:
            if not self._is_closed:
                self._orders.append((order, written))
                os.eventfd_write(self._news, 1)

    def complete(self, first_token_id: int) -> None:
        """What the step of the last order has sampled."""
        with self._lock:
            if not self._is_closed:
                self._first_token_id = first_token_id
                os.eventfd_write(self._news, 1)

    def interrupt(self) -> None:
        """Stop waiting for a peer; called once the hold is given up."""
        with self._lock:
            if self._is_closed:
                return
            if self._channel is not None:
                self._channel.interrupt()
            os.eventfd_write(self._news, 1)

    def run(self) -> None:
        """Send everything and wait until the peer has accepted; ends the hold either way."""
        ends: dict[str, SendingEnd] = {}
        try:
            channel = self._dial()
            end = self._open(channel, ends)
            token_ids: list[int] = []
            while not token_ids:
                token_ids = self._ship_next(channel, end)
            self._wait_until(lambda: self._first_token_id is not None, channel)
            self._complete(channel, token_ids)
            self.hold.end(self.hold.request_id)
        except (KVTransferError, LinkBroken, LinkRefused, msgspec.DecodeError, OSError) as error:
            reason = f"sending KV to {self._target.node_id} at {self._target.address}: {error}"
            self.hold.fail(reason, fault_of(error))
        finally:
            self.hold.fail("sending KV ended without a result")
            self._close(ends)

    def _ship_next(self, channel: Channel, end: SendingEnd) -> list[int]:
        """Ship the next order; returns its `token_ids`, which only the last one has."""
        self._wait_until(lambda: bool(self._orders), channel)
        order, written = self._orders.popleft()
        written.wait()
        for start, slots in blocks(
            order.start, order.slots, self._node.lanes[self.hold.lane].tokens_per_block
        ):
            self._ship(channel, end, start, slots)
        return order.token_ids

    def _ship(self, channel: Channel, end: SendingEnd, start: int, slots: np.ndarray) -> None:
        index, size = len(self._chunks), len(slots) * self._node.lanes[self.hold.lane].rows.token_bytes
        while self._num_unacknowledged >= WINDOW:
            self._take_ack(channel)
        with self.hold.touching():
            fields = end.pack(index, slots)
        channel.send(Block(index=index, start=start, count=len(slots), fields=fields), self._silence_s)
        end.push(channel, index, size, self._silence_s)
        self._chunks.append((start, len(slots)))
        self._num_unacknowledged += 1
        self.hold.num_bytes += size

    @property
    def _silence_s(self) -> float:
        return self._node.limits.silence_s

    def _dial(self) -> Channel:
        addresses = self._target.address.split(",")  # one for each rank
        if len(addresses) != self._node.layout.tp_size:
            raise KVTransferError(
                f"{self._target.node_id} has {len(addresses)} ranks, here are {self._node.layout.tp_size}"
            )
        scheme, _, place = addresses[self._node.rank].partition("://")
        host, _, port = place.rpartition(":")
        if scheme != "tcp" or not port.isdigit():
            raise KVTransferError(f"{self._target.address!r} is no address of a KV link (tcp://HOST:PORT)")
        sock = socket.create_connection((host.strip("[]"), int(port)), self._node.limits.handshake_s)
        channel = Channel(sock)
        with self._lock:
            self._channel = channel
        if self.hold.is_over:
            raise KVTransferError("the transfer was given up here")
        return channel

    def _open(self, channel: Channel, ends: dict[str, SendingEnd]) -> SendingEnd:
        """Greet the receiver; it chooses one of our lanes."""
        node, limits = self._node, self._node.limits
        for name in node.lanes.names:
            ends[name] = node.lanes.take_sender(name)
        opening = Opening(
            ticket=self._target.ticket,
            target_epoch=self._target.epoch,
            start=self._start,
            layout=node.layout,
            lanes=[LaneOffer(name=name, fields=end.offer()) for name, end in ends.items()],
        )
        dialer = Dialer(node.token, frames.PURPOSE, socket.gethostname(), node.epoch, frames.encode(opening))
        channel.send_raw(dialer.answer(channel.receive_raw(limits.handshake_s)), limits.handshake_s)
        # The receiver may wait for its own order first.
        welcome, channel.seal = dialer.finish(channel.receive_raw(limits.handshake_s + limits.ticket_s))
        lane = frames.decode(welcome.detail, Choice).lane
        if lane not in ends:
            raise LinkBroken(f"the peer chose lane {lane!r}, offered were {', '.join(ends)}")
        self.hold.lane = lane
        return ends[lane]

    def _wait_until(self, is_ready: Callable[[], bool], channel: Channel) -> None:
        """Wait for the engine, listen to the peer meanwhile, and let it know that we live."""
        spoke_s = time.monotonic()
        while True:
            if self.hold.is_over:
                raise KVTransferError("the transfer was given up here")
            if is_ready():
                return
            poll = select.poll()
            poll.register(channel.fileno(), select.POLLIN)
            poll.register(self._news, select.POLLIN)
            limit_s = max(0.0, spoke_s + self._node.limits.alive_s - time.monotonic())
            for fd, _ in poll.poll(limit_s * 1000):
                if fd == self._news:
                    os.eventfd_read(self._news)
                else:
                    self._take_ack(channel)
            if time.monotonic() - spoke_s >= self._node.limits.alive_s:
                channel.send(Alive(), self._silence_s)
                spoke_s = time.monotonic()

    def _take_ack(self, channel: Channel) -> None:
        match channel.receive(frames.FromReceiver, self._silence_s):
            case Ack() if self._num_unacknowledged:
                self._num_unacknowledged -= 1
            case Rejected(reason=reason):
                raise KVTransferError(f"the receiver gave up: {reason}", fault="not_accepted")
            case other:
                raise LinkBroken(f"{type(other).__name__} out of turn")

    def _complete(self, channel: Channel, token_ids: list[int]) -> None:
        assert self._first_token_id is not None
        while self._num_unacknowledged:
            self._take_ack(channel)
        complete = Complete(
            ticket=self._target.ticket,
            source_epoch=self._node.epoch,
            target_epoch=self._target.epoch,
            num_tokens=len(token_ids),
            first_token_id=self._first_token_id,
            digest=digest(self._node.layout, token_ids, self._chunks),
        )
        channel.send(complete, self._silence_s)
        match channel.receive(frames.FromReceiver, self._silence_s):
            case Accepted():
                return
            case Rejected(reason=reason):
                raise KVTransferError(f"the receiver does not accept it: {reason}", fault="not_accepted")
            case other:
                raise LinkBroken(f"{type(other).__name__} out of turn")

    def _close(self, ends: dict[str, SendingEnd]) -> None:
        with self._lock:
            self._is_closed = True
            if self._channel is not None:
                self._channel.close()
            os.close(self._news)
        for name, end in ends.items():
            self._node.lanes.put_back(name, end)
