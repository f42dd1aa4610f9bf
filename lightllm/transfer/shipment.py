"""Sending: all that a rank sends of one request. Shipment: to one rank of the receiver, in its own thread.

A shipment takes a connection that was kept or dials, offers lanes, then packs and announces each order's
blocks as they come, so that the beginning of a prompt is on its way while the rest of it is computed. Reads
slots only while it holds them.
"""

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import numpy as np

from lightllm.cluster_link import Dialer, LinkBroken, LinkRefused, Refused
from lightllm.device.base import Moment
from lightllm.errors import ConfigError, KVTransferError
from lightllm.messages import KVLayout, KVTarget, KVTransferOrder
from lightllm.packed_ints import Ints, pack
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
    Late,
    Opening,
    Ready,
    Rejected,
)
from lightllm.transfer.lane import WINDOW, Lanes, SendingEnd
from lightllm.transfer.peers import Peers
from lightllm.transfer.plan import KVRows, Part, blocks, digest, parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What all transfers of this node have in common.

    Attributes:
        rank: of those that share the model.
        head_ranges: number of ranks -> the KV heads that each of them holds; raises ConfigError.
        lanes: those that it has open.
        epoch: of this life of the KV link.
    """

    layout: KVLayout
    token: bytes = field(repr=False)
    epoch: int
    lanes: Lanes
    limits: Limits
    head_ranges: Callable[[int], Sequence[range]]
    rank: int = 0

    @property
    def rows(self) -> KVRows:
        """All rows of this rank."""
        return self.lanes[self.lanes.names[0]].rows

    def sends(self, target_size: int) -> list[Part]:
        """What this rank has for those of a receiver with so many.

        Raises:
            KVTransferError: the model cannot be spread over so many.
        """
        own, theirs = self._ranges(self.layout.tp_size), self._ranges(target_size)
        return [part for part in parts(own, theirs) if part.source_rank == self.rank]

    def receives(self, source_size: int) -> list[Part]:
        """What those of a sender with so many have for this rank.

        Raises:
            KVTransferError: as `sends`.
        """
        own, theirs = self._ranges(self.layout.tp_size), self._ranges(source_size)
        return [part for part in parts(theirs, own) if part.target_rank == self.rank]

    def _ranges(self, size: int) -> Sequence[range]:
        try:
            return self.head_ranges(size)
        except ConfigError as error:
            raise KVTransferError(f"a node of {size} ranks: {error}", fault="bad_layout") from error


class Sending:
    """Sends the KV of one request to all ranks that need heads of this one.

    Args:
        peers: connections that can be used again.
        first: its first order.
        hold: on the slots of all its orders.

    Attributes:
        shipments: what is to be run; none where other ranks have all that is needed.
    """

    def __init__(self, node: Node, peers: Peers, first: KVTransferOrder, hold: Hold) -> None:
        assert first.target is not None, "an order to send names its target"
        self.hold = hold
        self.shipments: list[Shipment] = []
        addresses = first.target.address.split(",")  # one for each rank
        try:
            found = node.sends(len(addresses))
        except KVTransferError as error:
            hold.fail(f"sending KV to {first.target.node_id}: {error}", fault_of(error))
            return
        hold.num_parts = len(found)
        self.shipments = [
            Shipment(node, peers, first, addresses[p.target_rank], p.heads, hold) for p in found
        ]

    def add(self, order: KVTransferOrder, written: Moment) -> None:
        """Ship this, too, once the device is past that moment; called in the order of positions."""
        for shipment in self.shipments:
            shipment.add(order, written)
        if not self.shipments and order.token_ids:
            self.hold.end(self.hold.request_id)

    def complete(self, first_token_id: int) -> None:
        """What the step of the last order has sampled."""
        for shipment in self.shipments:
            shipment.complete(first_token_id)

    def interrupt(self) -> None:
        """Stop waiting for peers; called once the hold is given up."""
        for shipment in self.shipments:
            shipment.interrupt()


class Shipment:
    """Sends some heads of the KV of one request.

    Args:
        peers: see Sending.
        first: its first order.
        address: of the rank that it goes to.
        heads: the model's KV heads that it brings.
        hold: on the slots of all its orders.
    """

    def __init__(
        self, node: Node, peers: Peers, first: KVTransferOrder, address: str, heads: range, hold: Hold
    ) -> None:
        assert first.target is not None, "an order to send names its target"
        self.hold = hold
        self._node = node
        self._peers = peers
        self._address = address
        self._rows = node.rows.part(heads)
        self._target: KVTarget = first.target
        self._start = 0
        self._orders: deque[tuple[KVTransferOrder, Moment]] = deque()
        self._first_token_id: int | None = None
        self._news = os.eventfd(0, os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._is_closed = False
        self._speaking = threading.Lock()
        self._is_computing = False
        self._is_promising = False
        self._chunks: list[tuple[int, int]] = []
        self._num_unacknowledged = 0
        self._idle_since_s = 0.0
        self._waited_s = 0.0
        self._idle_s = 0.0

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

    def keep_alive(self) -> None:
        """Let the peer know that we live, if a step is waited for; called now and then, in another thread."""
        with self._speaking:
            if self._is_computing and self._channel is not None:
                try:
                    self._channel.send(Alive(), self._silence_s)
                except KVTransferError:
                    pass  # who waits will hear of it

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Wait for a step, which may take longer than the peer bears silence: another thread speaks."""
        self._is_computing = True
        try:
            yield
        finally:
            with self._speaking:
                self._is_computing = False

    def run(self) -> bool:
        """Send everything and wait until the peer has accepted; ends the hold, or its part of it.

        Returns:
            Whether it has; otherwise the hold's ending says why not.
        """
        ends: dict[str, SendingEnd] = {}
        is_done = False
        try:
            channel, end = self._begin(ends)
            token_ids = pack()
            while not token_ids:
                token_ids = self._ship_next(channel, end)
            agreed = digest(self._node.layout, self._rows.heads, token_ids, self._chunks)
            with self._waiting_for_engine():
                self._wait_until(lambda: self._first_token_id is not None, channel)
            self._complete(channel, len(token_ids), agreed, end.is_in_place)
            self.hold.end_part(self.hold.request_id, self._idle_s)
            if self._is_promising:
                self.hold.keep_no_more()  # not before: a cancellation that waits comes behind the success
            self.hold.log()
            is_done = True
        except (KVTransferError, LinkBroken, LinkRefused, msgspec.DecodeError, OSError) as error:
            reason = f"sending KV to {self._target.node_id} at {self._address}: {error}"
            self.hold.fail(reason, fault_of(error))
        finally:
            if not is_done:
                self.hold.fail("sending KV ended without a result")
            self._close(ends, is_done)
        return is_done

    def _ship_next(self, channel: Channel, end: SendingEnd) -> Ints:
        """Ship what the receiver lacks of the next order; its `token_ids`, which only the last one has."""
        with self._waiting_for_engine():
            self._wait_until(lambda: bool(self._orders), channel)
        order, written = self._orders.popleft()
        num_there = max(0, self._start - order.start)
        pieces = blocks(order.start + num_there, order.slots[num_there:], end.cut.tokens_per_block)
        ahead = None
        if end.is_in_place and not written.is_past():
            ahead = next(pieces, None)
        if ahead is not None:
            self._ship(channel, end, *ahead, is_ahead=True)
        while self._num_unacknowledged and not written.is_past():
            self._take_ack(channel)
        with self._waiting_for_engine(), self._computing():
            written.wait()
        if ahead is not None:
            self.hold.check()
            channel.send(Ready(waited_s=self._take_waited_s()), self._silence_s)
            self._note_shipped(len(ahead[1]))
        for start, slots in pieces:
            self._ship(channel, end, start, slots)
        return order.token_ids

    def _ship(
        self, channel: Channel, end: SendingEnd, start: int, slots: np.ndarray, is_ahead: bool = False
    ) -> None:
        """Ship a block, or announce it `is_ahead` of its KV."""
        index = len(self._chunks)
        while self._num_unacknowledged >= WINDOW:
            self._take_ack(channel)
        with self.hold.touching():
            fields = end.pack(index, slots)
        waited_s = 0.0 if is_ahead else self._take_waited_s()
        block = Block(
            index=index, start=start, count=len(slots), fields=fields, waited_s=waited_s, is_ahead=is_ahead
        )
        channel.send(block, self._silence_s)
        self._chunks.append((start, len(slots)))
        if not is_ahead:
            end.push(channel, index, len(slots) * self._rows.token_bytes, self._silence_s)
            self._note_shipped(len(slots))

    def _note_shipped(self, num_tokens: int) -> None:
        self._num_unacknowledged += 1
        self.hold.moved(num_tokens * self._rows.token_bytes)

    def _take_waited_s(self) -> float:
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    @property
    def _silence_s(self) -> float:
        return self._node.limits.silence_s

    def _begin(self, ends: dict[str, SendingEnd]) -> tuple[Channel, SendingEnd]:
        """Find the receiver ready, on a connection that was kept or on a new one."""
        opening = self._opening(ends)
        kept = self._peers.take(self._address)
        if kept is not None:
            self._use(kept)
            try:
                return kept, self._open(kept, opening, ends)
            except KVTransferError as error:
                if error.fault != "peer_lost" or self.hold.is_over:
                    raise
            kept.close()  # it was closed there at this moment, or the peer was started anew
        channel = self._dial()
        return channel, self._open(channel, opening, ends)

    def _dial(self) -> Channel:
        scheme, _, place = self._address.partition("://")
        host, _, port = place.rpartition(":")
        if scheme != "tcp" or not port.isdigit():
            raise KVTransferError(f"{self._address!r} is no address of a KV link (tcp://HOST:PORT)")
        sock = socket.create_connection((host.strip("[]"), int(port)), self._node.limits.handshake_s)
        channel = Channel(sock)
        self._use(channel)
        node, limits = self._node, self._node.limits
        dialer = Dialer(node.token, frames.PURPOSE, socket.gethostname(), node.epoch)
        channel.send_raw(dialer.answer(channel.receive_raw(limits.handshake_s)), limits.handshake_s)
        _, channel.seal = dialer.finish(channel.receive_raw(limits.handshake_s))
        return channel

    def _use(self, channel: Channel) -> None:
        with self._lock:
            self._channel = channel
        self.hold.check()

    def _opening(self, ends: dict[str, SendingEnd]) -> Opening:
        node = self._node
        for name in node.lanes.names:
            ends[name] = node.lanes.take_sender(name, self._rows)
        return Opening(
            ticket=self._target.ticket,
            target_epoch=self._target.epoch,
            rank=node.rank,
            layout=node.layout,
            lanes=[LaneOffer(name=name, fields=end.offer()) for name, end in ends.items()],
        )

    def _open(self, channel: Channel, opening: Opening, ends: dict[str, SendingEnd]) -> SendingEnd:
        """Offer our lanes to the receiver, which chooses one of them."""
        limits = self._node.limits
        channel.send(opening, limits.handshake_s)
        # The receiver may wait for its own order first.
        match channel.receive(frames.FirstFromReceiver, limits.handshake_s + limits.ticket_s):
            case Choice(lane=lane, start=start) if lane in ends:
                self.hold.lane, self._start = lane, start
                self._idle_since_s = self.hold.begin()
                return ends[lane]
            case Refused(code=code, text=text, diff=diff):
                raise LinkRefused(code, text, diff=diff)
            case other:
                raise LinkBroken(f"the peer answered {other!r}, offered were {', '.join(ends)}")

    @contextmanager
    def _waiting_for_engine(self) -> Iterator[None]:
        """Count the time in which nothing was on its way, from when all that was sent had been taken.

        What was done since then, in preparation, has cost nothing.
        """
        yield
        if self._num_unacknowledged:
            return
        now_s = time.monotonic()
        self._waited_s += now_s - self._idle_since_s
        self._idle_s += now_s - self._idle_since_s
        self._idle_since_s = now_s

    def _wait_until(self, is_ready: Callable[[], bool], channel: Channel) -> None:
        """Wait for the engine, listen to the peer meanwhile, and let it know that we live."""
        spoke_s = time.monotonic()
        while True:
            self.hold.check()
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
                self._idle_since_s = time.monotonic()
            case Rejected(reason=reason):
                raise KVTransferError(f"the receiver gave up: {reason}", fault="not_accepted")
            case other:
                raise LinkBroken(f"{type(other).__name__} out of turn")

    def _complete(self, channel: Channel, num_tokens: int, agreed: bytes, is_in_place: bool) -> None:
        """Say the last word, which vouches for what the peer reads, and wait for its answer."""
        assert self._first_token_id is not None
        while self._num_unacknowledged and not is_in_place:
            self._take_ack(channel)
        complete = Complete(
            ticket=self._target.ticket,
            source_epoch=self._node.epoch,
            target_epoch=self._target.epoch,
            num_tokens=num_tokens,
            first_token_id=self._first_token_id,
            digest=agreed,
            waited_s=self._waited_s,
        )
        if self._num_unacknowledged and self._is_accepted_by_promise(channel, complete):
            return
        self.hold.check()
        channel.send(complete, self._silence_s)  # all has been read: our slots were ours until now
        if not _is_accepted(self._answer(channel)):
            raise LinkBroken("Late out of turn")

    def _is_accepted_by_promise(self, channel: Channel, complete: Complete) -> bool:
        """Promise to keep the slots while the peer reads the last blocks; False: it took longer."""
        until_s = self.hold.promise(self._node.limits.kept_s)
        channel.send(msgspec.structs.replace(complete, kept_until_s=until_s), self._silence_s)
        answer = self._answer(channel)
        self._is_promising = isinstance(answer, Accepted)  # until the success is noted
        if not self._is_promising:
            self.hold.keep_no_more()
        return _is_accepted(answer)

    def _answer(self, channel: Channel) -> Accepted | Late | Rejected:
        """What the peer says to the last word."""
        while True:
            match channel.receive(frames.FromReceiver, self._silence_s):
                case Accepted() | Late() | Rejected() as answer:
                    self._num_unacknowledged = 0
                    return answer
                case Ack() if self._num_unacknowledged:
                    self._num_unacknowledged -= 1
                case other:
                    raise LinkBroken(f"{type(other).__name__} out of turn")

    def _close(self, ends: dict[str, SendingEnd], is_done: bool) -> None:
        with self._lock:
            self._is_closed = True
            if self._channel is not None and is_done:
                self._peers.keep(self._address, self._channel)
            elif self._channel is not None:
                self._channel.close()
            os.close(self._news)
        for name, end in ends.items():
            self._node.lanes.put_back(name, end)


def _is_accepted(answer: Accepted | Late | Rejected) -> bool:
    """Whether a receiver has taken all; False: it was late.

    Raises:
        KVTransferError: it does not take it.
    """
    if isinstance(answer, Rejected):
        raise KVTransferError(f"the receiver does not accept it: {answer.reason}", fault="not_accepted")
    return isinstance(answer, Accepted)
