"""Receipt: the receiver's end of one transfer; runs in the thread of the sender's connection.

Writes into slots only while it holds them: whoever gives the hold up knows that no byte can land any more,
whatever the sender does later.
"""

import threading
import time

import numpy as np

from lightllm.cluster_link import LinkBroken
from lightllm.device.base import Moment
from lightllm.errors import KVTransferError
from lightllm.messages import KVArrival, KVSource, KVTransferOrder
from lightllm.transfer import frames
from lightllm.transfer.base import Hold, fault_of
from lightllm.transfer.channel import Channel
from lightllm.transfer.frames import Accepted, Ack, Alive, Block, Complete, Rejected
from lightllm.transfer.lane import Lane, ReceivingEnd
from lightllm.transfer.plan import digest
from lightllm.transfer.shipment import Node


class Receipt:
    """Receives the KV of one request.

    Args:
        order: what to expect, and from whom.
        hold: on the order's slots.
        free: the moment behind which they may be written.
    """

    def __init__(self, node: Node, order: KVTransferOrder, hold: Hold, free: Moment) -> None:
        assert order.source is not None, "an order to receive names its source"
        self.hold = hold
        self.source: KVSource = order.source
        self.start = order.start
        self._node = node
        self._free = free
        self._token_ids = order.token_ids
        self._slots = np.array(order.slots, dtype=np.int64)
        self._lock = threading.Lock()
        self._is_claimed = False
        self._channel: Channel | None = None
        self._chunks: list[tuple[int, int]] = []

    def claim(self, channel: Channel) -> bool:
        """Whether this connection is the one that the ticket admits: the first, while it is wanted."""
        with self._lock:
            if self._is_claimed or self.hold.is_over:
                return False
            self._is_claimed = True
            self._channel = channel
            self.hold.began_s = time.monotonic()
            return True

    def interrupt(self) -> None:
        """Stop waiting for the peer; called once the hold is given up."""
        with self._lock:
            if self._channel is not None:
                self._channel.interrupt()

    def run(self, channel: Channel, lane: Lane, end: ReceivingEnd) -> None:
        """Take blocks by this lane until the sender has completed; ends the hold either way.

        Raises:
            KVTransferError, LinkBroken: the transfer has failed; the hold's ending says why.
        """
        try:
            while True:
                match channel.receive(frames.FromSender, self._node.limits.silence_s):
                    case Block() as block:
                        self._take(channel, lane, end, block)
                    case Complete() as complete:
                        self._accept(channel, complete)
                        return
                    case Alive():
                        continue
        except (KVTransferError, LinkBroken, OSError) as error:
            reason = f"receiving KV from {self.source.node_id}: {error}"
            self.hold.fail(reason, fault_of(error))
            self._tell(channel, reason)
            raise

    def _take(self, channel: Channel, lane: Lane, end: ReceivingEnd, block: Block) -> None:
        num_there = sum(count for _, count in self._chunks)
        first, stop = num_there, num_there + block.count
        is_next = block.index == len(self._chunks) and block.start == self.start + first
        if not is_next or not 1 <= block.count <= lane.tokens_per_block or stop > len(self._slots):
            raise LinkBroken(
                f"block {block.index} of {block.count} tokens from {block.start}; expected was block "
                f"{len(self._chunks)} from {self.start + first} with 1..{lane.tokens_per_block} tokens of "
                f"{len(self._slots) - first} left"
            )
        size = block.count * lane.rows.token_bytes
        end.pull(channel, block, size, self._node.limits.silence_s)
        self._free.wait()
        with self.hold.touching():
            end.unpack(self._slots[first:stop])
        self._chunks.append((block.start, block.count))
        self.hold.num_bytes += size
        channel.send(Ack(), self._node.limits.silence_s)

    def _accept(self, channel: Channel, complete: Complete) -> None:
        ours = {
            "ticket": self.source.ticket,
            "source_epoch": self.source.epoch,
            "target_epoch": self._node.epoch,
            "num_tokens": len(self._token_ids),
            "digest": digest(self._node.layout, self._token_ids, self._chunks),
        }
        wrong = [name for name, value in ours.items() if getattr(complete, name) != value]
        num_there = sum(count for _, count in self._chunks)
        if num_there != len(self._slots):
            wrong.append(f"{num_there} of {len(self._slots)} tokens came")
        if wrong:
            text = f"the sender's end does not match: {', '.join(wrong)}"
            raise KVTransferError(text, fault="not_accepted")
        arrival = KVArrival(request_id=self.hold.request_id, first_token_id=complete.first_token_id)
        if not self.hold.end(arrival):
            raise KVTransferError("the transfer was given up here")
        channel.send(Accepted(), self._node.limits.silence_s)

    def _tell(self, channel: Channel, reason: str) -> None:
        """Let the sender know at once, if it still listens."""
        try:
            channel.send(Rejected(reason=reason[:500]), self._node.limits.handshake_s)
        except KVTransferError:
            pass
