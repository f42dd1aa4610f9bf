"""Lane: a way that the KV of blocks takes from one node to another, beside the frames that announce them.

A node opens each lane once, with its KV link (`Lane`); each transfer then has two ends. The sender's makes
a block ready and says in its frame what the receiver must know; the receiver's gets it and writes it into
slots. At most `WINDOW` blocks are on their way at a time: block i may use the staging memory of block
i - WINDOW, which the receiver has acknowledged.

Most lanes pack blocks into staging memory (`StagedSender`, `StagedReceiver`). That is a torch tensor of
bytes, on the host or on the pool's device, as the lane likes it: `KVRows` packs and unpacks both.
"""

import importlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from lightllm.errors import KVTransferError
from lightllm.transfer import LANES
from lightllm.transfer.channel import Channel
from lightllm.transfer.frames import Block
from lightllm.transfer.plan import KVRows

logger = logging.getLogger(__name__)

WINDOW = 4
MAX_SPARE_ENDS = 4


class LaneUnavailable(KVTransferError):
    """This node, or this pair of nodes, cannot use the lane."""


class Cut(NamedTuple):
    """What a transfer moves: which rows of the node's KV, and into which blocks it is cut.

    Both ends make the same of it, whatever else their nodes hold.
    """

    rows: KVRows
    tokens_per_block: int

    @property
    def block_bytes(self) -> int:
        """The largest block."""
        return self.tokens_per_block * self.rows.token_bytes


class SendingEnd(ABC):
    """The sender's end; serves one transfer at a time.

    Attributes:
        cut: of that transfer.
        is_in_place: the receiver reads slots themselves, so that `pack` may be called before they are
            computed, and `push` has nothing to do. Both ends are on one host, and have one clock.
    """

    cut: Cut
    is_in_place: ClassVar[bool] = False

    @abstractmethod
    def offer(self) -> bytes:
        """What the receiver needs to know to open its end."""

    @abstractmethod
    def pack(self, index: int, slots: np.ndarray) -> bytes:
        """Make a block ready: the KV of these slots, [n] int64, which is computed, but see `is_in_place`.

        Called while the slots are held; they are not touched here once it has returned.

        Returns:
            What the receiver must know of this block, for its frame.
        """

    @abstractmethod
    def push(self, channel: Channel, index: int, size: int, limit_s: float) -> None:
        """Make the `size` bytes of a block that is ready reach the peer; its frame has been sent."""

    @abstractmethod
    def close(self) -> None:
        """Give up what the end holds."""


class ReceivingEnd(ABC):
    """The receiver's end, for one transfer."""

    @abstractmethod
    def pull(self, channel: Channel, block: Block, size: int, limit_s: float) -> None:
        """Get the `size` bytes of an announced block, as far as that touches no slots.

        Raises:
            KVTransferError: they do not come.
            LinkBroken: the frame's `fields` are not what the lane's sender says.
        """

    def prepare(self, slots: np.ndarray) -> None:
        """The block that was pulled last will be unpacked into these slots: do what touches none of them."""
        return

    @abstractmethod
    def unpack(self, slots: np.ndarray) -> None:
        """Write the block that was pulled last into slots, [n] int64; returns when that is done.

        Called while the slots are held. Afterwards the block is acknowledged.
        """

    @abstractmethod
    def close(self) -> None:
        """Give up what the end holds."""


class Lane(ABC):
    """A way as one node has it open, for all its transfers; keeps what these share.

    Args:
        rows: the node's KV.
        block_bytes: a block is no larger than this, unless one token is. Both nodes must have the same.

    Attributes:
        most_bytes: a block has no more, unless one token has.
        block_bytes: room for a block of any transfer.

    Raises:
        LaneUnavailable: this node cannot use it; the message says why.
    """

    BLOCK_BYTES: ClassVar[int] = 4 * 1024 * 1024

    def __init__(self, rows: KVRows, block_bytes: int | None = None) -> None:
        self.rows = rows
        self.most_bytes = block_bytes or self.BLOCK_BYTES
        self.block_bytes = max(self.most_bytes, rows.token_bytes)

    def cut(self, rows: KVRows) -> Cut:
        """Cut a transfer of these rows, which are some of the node's."""
        return Cut(rows, max(1, self.most_bytes // rows.token_bytes))

    @abstractmethod
    def open_sender(self) -> SendingEnd:
        """Open a sender's end; who uses it sets its `cut`."""

    @abstractmethod
    def open_receiver(self, fields: bytes, cut: Cut) -> ReceivingEnd:
        """Open the receiver's end from what `SendingEnd.offer` made.

        Raises:
            LaneUnavailable: it cannot be used between these two.
        """

    @staticmethod
    def check_worth() -> None:
        """Called before the lane is opened beside others, by `--kv_transport auto`.

        Raises:
            LaneUnavailable: a later one in the list does better here.
        """
        return

    def start(self) -> None:
        """Called when the lane is the only one: do now what otherwise waits for the first transfer.

        Raises:
            LaneUnavailable: it does not work.
        """
        return

    def close(self) -> None:
        """Give up what transfers share; all ends are closed."""
        return


class StagedSender(SendingEnd):
    """Packs blocks into staging memory, from where `push` moves them."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane

    @abstractmethod
    def staging(self, index: int) -> Tensor:
        """Where block `index` is to be packed: uint8 [cut.block_bytes], contiguous."""

    def pack(self, index: int, slots: np.ndarray) -> bytes:
        self.cut.rows.pack(slots, self.staging(index))
        return b""


class StagedReceiver(ReceivingEnd):
    """Unpacks blocks from where `fetch` has got them."""

    def __init__(self, lane: Lane, cut: Cut) -> None:
        self.lane = lane
        self.cut = cut
        self._fetched: Tensor | None = None

    @abstractmethod
    def fetch(self, channel: Channel, block: Block, size: int, limit_s: float) -> Tensor:
        """The bytes of an announced block: uint8 [size], contiguous, good until it is acknowledged."""

    def pull(self, channel: Channel, block: Block, size: int, limit_s: float) -> None:
        self._fetched = self.fetch(channel, block, size, limit_s)

    def unpack(self, slots: np.ndarray) -> None:
        assert self._fetched is not None, "a block is pulled first"
        self.cut.rows.unpack(slots, self._fetched)


class Lanes:
    """The lanes that a node has open, and senders' ends that have served a transfer and may serve the next.

    New staging memory costs more than a copy. A receiver that still looks into the memory of a transfer that
    it has given up reads what is not meant for it; but it is told nothing of it any more, and so accepts none
    of it.

    Args:
        lanes: in the order in which they are tried.
    """

    def __init__(self, lanes: Mapping[str, Lane]) -> None:
        self._lanes = dict(lanes)
        self._lock = threading.Lock()
        self._spare: dict[str, list[SendingEnd]] = {name: [] for name in lanes}

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they are tried."""
        return tuple(self._lanes)

    def __getitem__(self, name: str) -> Lane:
        return self._lanes[name]

    def take_sender(self, name: str, rows: KVRows) -> SendingEnd:
        """A sender's end of this lane, for a transfer of these rows."""
        lane = self._lanes[name]
        with self._lock:
            end = self._spare[name].pop() if self._spare[name] else None
        end = end or lane.open_sender()
        end.cut = lane.cut(rows)
        return end

    def put_back(self, name: str, end: SendingEnd) -> None:
        """Give a sender's end back; it is kept, or closed."""
        with self._lock:
            if len(self._spare[name]) < MAX_SPARE_ENDS:
                self._spare[name].append(end)
                return
        end.close()

    def close(self) -> None:
        """Close all that is kept, and the lanes."""
        with self._lock:
            for end in (end for spare in self._spare.values() for end in spare):
                end.close()
            self._spare = {name: [] for name in self._lanes}
        for lane in self._lanes.values():
            lane.close()


def open_lanes(names: Iterable[str], rows: KVRows, block_bytes: int | None = None) -> Lanes:
    """Open those of the lanes of LANES that this node can use; the log says which it cannot, and why.

    Raises:
        LaneUnavailable: it can use none of them.
    """
    lanes: dict[str, Lane] = {}
    reasons, names = [], tuple(names)
    for name in names:
        module, _, attribute = LANES[name].partition(":")
        lane: type[Lane] = getattr(importlib.import_module(module), attribute)
        try:
            if len(names) > 1:
                lane.check_worth()
            opened = lane(rows, block_bytes)
            if len(names) == 1:
                opened.start()
            lanes[name] = opened
        except LaneUnavailable as error:
            reasons.append(f"{name}: {error}")
            logger.info("KV link: no lane %s", reasons[-1])
    if not lanes:
        raise LaneUnavailable("; ".join(reasons))
    return Lanes(lanes)
