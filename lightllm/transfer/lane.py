"""Lane: a way that the bytes of blocks take from one node to another, beside the frames that announce them.

A lane has two ends. The sender's gives out staging memory for a block and makes it reach the peer; the
receiver's makes the block readable there. At most `WINDOW` blocks are on their way at a time: block i may use
the staging memory of block i - WINDOW, which the receiver has acknowledged.
"""

import importlib
from abc import ABC, abstractmethod

import numpy as np

from lightllm.errors import KVTransferError
from lightllm.transfer import LANES
from lightllm.transfer.channel import Channel

WINDOW = 4


class LaneUnavailable(KVTransferError):
    """This pair of nodes cannot use the lane."""


class SendingEnd(ABC):
    """The sender's end, for one transfer."""

    @abstractmethod
    def offer(self) -> bytes:
        """What the receiver needs to know to open its end."""

    @abstractmethod
    def staging(self, index: int) -> np.ndarray:
        """Where block `index` is to be packed: uint8, a whole block."""

    @abstractmethod
    def push(self, channel: Channel, index: int, size: int, limit_s: float) -> None:
        """Make the first `size` bytes of a packed block reach the peer; its frame has been sent."""

    @abstractmethod
    def close(self) -> None:
        """Give up the staging memory."""


class ReceivingEnd(ABC):
    """The receiver's end, for one transfer."""

    @abstractmethod
    def pull(self, channel: Channel, index: int, size: int, limit_s: float) -> np.ndarray:
        """The bytes of an announced block: uint8 [size], good until the block is acknowledged."""

    @abstractmethod
    def close(self) -> None:
        """Give up what `pull` returned."""


class Lane(ABC):
    """How to open the ends."""

    @staticmethod
    @abstractmethod
    def open_sender(block_bytes: int) -> SendingEnd:
        """Open the sender's end for blocks of at most this size."""

    @staticmethod
    @abstractmethod
    def open_receiver(fields: bytes, block_bytes: int) -> ReceivingEnd:
        """Open the receiver's end from what `SendingEnd.offer` made.

        Raises:
            LaneUnavailable: it cannot be used between these two.
        """


def load_lane(name: str) -> type[Lane]:
    """The lane of this name in LANES."""
    module, _, attribute = LANES[name].partition(":")
    lane: type[Lane] = getattr(importlib.import_module(module), attribute)
    return lane
