"""Transport: what moves KV between this worker and those of other nodes, as the worker sees it.

Five verbs: `receive`, `send`, `complete`, `cancel`, `poll`. Orders in, endings out; every transfer that was
begun ends in exactly one ending, and from then on no byte of its slots is read or written. Runs in the worker
process; the verbs are called from the thread that launches steps, `complete` from the one that takes their
results; the work is done in threads of the transport.

A device may run behind the calls. Orders therefore come with a `Moment` of its work: slots are touched only
once the device is past it, and touching them has ended when the device has done it.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from lightllm.cluster_link import LinkBroken, LinkRefused
from lightllm.device.base import Moment
from lightllm.errors import KVTransferError
from lightllm.messages import KV_FAULTS, KVArrival, KVFailure, KVTransfer, KVTransferOrder

logger = logging.getLogger(__name__)


class Limits(NamedTuple):
    """How long the ends of a transfer wait, in seconds.

    Attributes:
        handshake_s: for the whole of dialling and greeting.
        silence_s: for the next word of a peer that owes one; one that is silent for longer has failed.
        alive_s: a sender with nothing to send says so this often.
        ticket_s: a peer that dials may be so much earlier than the order to expect it; longer than a request
            waits for slots, so that the one who says that there are none is its engine.
        kept_s: a sender whose slots are read in place may promise to keep them so long; a cancellation waits
            for the rest of that at most.
    """

    handshake_s: float = 5.0
    silence_s: float = 10.0
    alive_s: float = 1.0
    ticket_s: float = 8.0
    kept_s: float = 0.5


def fault_of(error: Exception) -> str:
    """The one of KV_FAULTS for an exception that ends a transfer."""
    match error:
        case KVTransferError(fault=fault):
            return fault
        case LinkRefused(reason=reason):
            return reason if reason in KV_FAULTS else "refused"
        case LinkBroken() | msgspec.DecodeError():
            return "bad_frame"
        case TimeoutError():
            return "peer_silent"
        case OSError():
            return "peer_lost"
    return "other"


class Endings(NamedTuple):
    """Transfers that have ended since the last poll, as StepOutput reports them; `transfers` are all."""

    received: list[KVArrival]
    sent: list[str]
    failed: list[KVFailure]
    transfers: list[KVTransfer]


class Ledger:
    """Endings on their way from the transport's threads to the worker's.

    Attributes:
        on_news: called, in any thread, when there is one.
    """

    def __init__(self) -> None:
        self.on_news: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._endings = Endings([], [], [], [])

    def note(self, ending: KVArrival | KVFailure | str, transfer: KVTransfer) -> None:
        """Add one; a string is the id of a request whose KV was sent."""
        with self._lock:
            self._endings.transfers.append(transfer)
            match ending:
                case KVArrival():
                    self._endings.received.append(ending)
                case KVFailure():
                    self._endings.failed.append(ending)
                case _:
                    self._endings.sent.append(ending)
        self.on_news()

    def take(self) -> Endings:
        """All since the last call."""
        with self._lock:
            endings, self._endings = self._endings, Endings([], [], [], [])
        return endings


class Hold:
    """The right to touch the slots of one transfer: until it is given up, once and for one reason.

    Args:
        direction: sent or received.

    Attributes:
        num_parts: ranks of the peer that it goes to or comes from, each by a connection of its own.
        lane: how the bytes go, empty until the two ends have agreed.
        num_bytes: payload that has been moved.
        began_s: monotonic time from which the transfer is measured: when the first of its parts has begun,
            or else the order.
    """

    def __init__(self, request_id: str, ledger: Ledger, direction: str) -> None:
        self.request_id = request_id
        self.direction = direction
        self.num_parts = 1
        self.lane = ""
        self.num_bytes = 0
        self.began_s = time.monotonic()
        self._ledger = ledger
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._num_promises = 0
        self._kept_until_s = 0.0
        self._failure: tuple[KVFailure, str] | None = None  # the first, which may have to wait
        self._has_begun = False
        self._is_over = False
        self._untold: KVTransfer | None = None
        self._idle_s: list[float] = []  # of the parts that have come through

    @property
    def is_over(self) -> bool:
        """Whether the slots may belong to somebody else already."""
        return self._is_over

    def check(self) -> None:
        """Make sure that the transfer is still wanted.

        Raises:
            KVTransferError: it has been given up here.
        """
        if self._is_over:
            raise self._given_up()

    @contextmanager
    def touching(self) -> Iterator[None]:
        """Read or write slots; whoever ends the transfer waits until this is done, on the device, too.

        Raises:
            KVTransferError: they are not ours any more.
        """
        with self._lock:
            if self._is_over:
                raise self._given_up()
            yield

    def begin(self) -> float:
        """A part begins: its two ends have found each other; the monotonic time."""
        now_s = time.monotonic()
        with self._lock:
            if not self._has_begun:
                self._has_begun, self.began_s = True, now_s
        return now_s

    def promise(self, limit_s: float) -> float:
        """Promise a peer to keep the slots until it has answered, for so long at most.

        Returns:
            Until when they are kept, in monotonic time.

        Raises:
            KVTransferError: they are not ours any more, or will not be when earlier promises have ended.
        """
        with self._lock:
            if self._is_over or self._failure is not None:
                raise self._given_up()
            self._num_promises += 1
            self._kept_until_s = time.monotonic() + limit_s
            return self._kept_until_s

    def will_fail(self, reason: str, fault: str) -> None:
        """A failure is to come: nothing is promised any more, and no later one is told instead of it."""
        with self._lock:
            self._failure = self._failure or (KVFailure(request_id=self.request_id, reason=reason), fault)

    def keep_no_more(self) -> None:
        """The peer has answered: it reads no more."""
        with self._changed:
            self._num_promises -= 1
            self._changed.notify_all()

    def moved(self, num_bytes: int) -> None:
        """Count payload."""
        with self._lock:
            self.num_bytes += num_bytes

    def end_part(self, ending: KVArrival | str, idle_s: float) -> None:
        """One part has come through; the last one ends the transfer, which is then to be logged.

        Args:
            idle_s: for so long it waited for the sender's engine with nothing on its way.

        Raises:
            KVTransferError: it has been given up.
        """
        with self._lock:
            if self._is_over:
                raise self._given_up()
            self._idle_s.append(idle_s)
            is_last = len(self._idle_s) == self.num_parts
        if is_last and not self.end(ending):
            raise self._given_up()

    def end(self, ending: KVArrival | KVFailure | str, fault: str = "") -> bool:
        """Give up the slots and report why; False if that has been done before.

        A failure waits until no promise binds us; meanwhile none is made. Of several the first is told.
        """
        with self._changed:
            if isinstance(ending, KVFailure):
                ending, fault = self._failure = self._failure or (ending, fault)
                limit_s = max(0.0, self._kept_until_s - time.monotonic())
                self._changed.wait_for(lambda: self._is_over or not self._num_promises, limit_s)
            if self._is_over:
                return False
            self._untold = transfer = KVTransfer(
                request_id=self.request_id,
                direction=self.direction,
                transport=self.lane or "none",
                fault=fault,
                num_bytes=self.num_bytes,
                duration_s=time.monotonic() - self.began_s - min(self._idle_s, default=0.0),
            )
            self._ledger.note(ending, transfer)  # before anybody can see that it is over, who then polls
            self._is_over = True
            self._changed.notify_all()
        return True

    def _given_up(self) -> KVTransferError:
        return KVTransferError(f"the transfer of {self.request_id} was given up here")

    def log(self) -> None:
        """Log how it has ended, if it has and the two ends had agreed on a lane; once."""
        with self._lock:
            transfer, self._untold = self._untold, None
        if transfer is None or not self.lane:
            return
        rate = transfer.num_bytes / max(transfer.duration_s, 1e-9) / 1e6
        values = transfer.num_bytes, transfer.transport, transfer.duration_s, rate
        logger.info(
            "KV of %s: %s %d bytes by %s in %.3f s (%.0f MB/s)", self.request_id, self.direction, *values
        )

    def fail(self, reason: str, fault: str = "other") -> bool:
        """Give up the slots because the transfer has failed; `fault` is one of KV_FAULTS."""
        is_new = self.end(KVFailure(request_id=self.request_id, reason=reason), fault)
        self.log()
        return is_new


class Transport(ABC):
    """Moves KV. `address` is where peers dial; empty if they cannot."""

    address = ""

    def __init__(self) -> None:
        self._ledger = Ledger()

    def watch(self, on_news: Callable[[], None]) -> None:
        """Have that called, in any thread, when `poll` has something to tell."""
        self._ledger.on_news = on_news

    @abstractmethod
    def receive(self, order: KVTransferOrder, free: Moment) -> None:
        """Expect the KV of a request; its slots may be written behind the moment `free`."""

    @abstractmethod
    def send(self, order: KVTransferOrder, written: Moment) -> None:
        """Ship KV that is computed at the moment `written`."""

    @abstractmethod
    def complete(self, request_id: str, first_token_id: int) -> None:
        """Tell the token that a request's last order was waiting for; nothing happens if it has ended."""

    @abstractmethod
    def cancel(self, *request_ids: str) -> None:
        """End these transfers as failed; nothing happens where there is none, or it has ended.

        When this returns their slots are not touched any more, and their endings wait for the next poll.
        Where a peer may still read by a promise, that is waited for, for `Limits.kept_s` in all; it may come
        through then.
        """

    def poll(self) -> Endings:
        """What has ended since the last call; never waits. Any thread may ask."""
        return self._ledger.take()

    @abstractmethod
    def close(self) -> None:
        """End everything; peers see their transfers fail."""


class NullTransport(Transport):
    """A node without a KV link: whatever is asked of it fails, and says so."""

    REASON = "this node has no KV link; start it with --run_mode prefill or decode"

    def receive(self, order: KVTransferOrder, free: Moment) -> None:
        Hold(order.request_id, self._ledger, "received").fail(self.REASON, "no_link")

    def send(self, order: KVTransferOrder, written: Moment) -> None:
        if order.start == 0:
            Hold(order.request_id, self._ledger, "sent").fail(self.REASON, "no_link")

    def complete(self, request_id: str, first_token_id: int) -> None:
        return

    def cancel(self, *request_ids: str) -> None:
        return

    def close(self) -> None:
        return
