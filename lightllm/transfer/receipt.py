"""Receipt: the KV of one request, from all ranks that have some of it. Intake: what one of them sends.

An intake runs in the thread of the sender's connection. It writes into slots only while the receipt holds
them: whoever gives the hold up knows that no byte can land any more, whatever the sender does later.
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
from lightllm.transfer.frames import Accepted, Ack, Alive, Block, Complete, Late, Ready, Rejected
from lightllm.transfer.lane import Cut, ReceivingEnd
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
        self.node = node
        self.free = free
        self.token_ids = order.token_ids
        self.slots = np.array(order.slots, dtype=np.int64)
        self._lock = threading.Lock()
        self._first_token_id: int | None = None
        self._source_size = 0
        self._channels: dict[int, Channel | None] = {}  # by the sender's rank; None: it has brought all

    def claim(self, channel: Channel, source_rank: int, source_size: int, num_parts: int) -> bool:
        """Whether the ticket admits this connection: the first of its rank, while it is wanted.

        Args:
            source_size: ranks of the sender, of which `num_parts` have something for us.
        """
        with self._lock:
            if not self._channels:
                self.hold.begin()
                self.hold.num_parts, self._source_size = num_parts, source_size
            if source_rank in self._channels or source_size != self._source_size or self.hold.is_over:
                return False
            self._channels[source_rank] = channel
            return True

    def interrupt(self, but: Channel | None = None) -> None:
        """Stop waiting for the peer; called once the hold is given up.

        Args:
            but: a connection that has still something to say.
        """
        with self._lock:
            for channel in self._channels.values():
                if channel is not None and channel is not but:
                    channel.interrupt()

    def release(self, channel: Channel) -> None:
        """This connection has brought its part, and may serve another transfer."""
        with self._lock:
            self._channels = {
                rank: None if other is channel else other for rank, other in self._channels.items()
            }

    def is_first_token(self, token_id: int) -> bool:
        """Whether all ranks so far have told this one."""
        with self._lock:
            self._first_token_id = token_id if self._first_token_id is None else self._first_token_id
            return token_id == self._first_token_id


class Intake:
    """Receives some heads of it, from one rank of the sender.

    Args:
        heads: the model's KV heads that it brings.
    """

    def __init__(self, receipt: Receipt, heads: range) -> None:
        self.receipt = receipt
        self.rows = receipt.node.rows.part(heads)
        self._chunks: list[tuple[int, int]] = []
        self._num_there = 0
        self._ahead: Block | None = None
        self._digest = b""
        self._owes_ack = False
        self._idle_s = 0.0
        self._last_s = 0.0
        self._since_s = 0.0

    def run(self, channel: Channel, end: ReceivingEnd, cut: Cut) -> None:
        """Take blocks until the sender has completed; ends the hold, or its part of it.

        Raises:
            KVTransferError, LinkBroken: the transfer has failed; the hold's ending says why.
        """
        hold, node = self.receipt.hold, self.receipt.node
        self._last_s = self._since_s = hold.began_s
        try:
            while True:
                self._acknowledge(channel)
                match channel.receive(frames.FromSender, node.limits.silence_s):
                    case Block() as block if self._ahead is None:
                        self._note_idle(block.waited_s)
                        self._expect(channel, end, cut, block)
                        if block.is_ahead:
                            self._ahead = block
                        else:
                            self._take(end, cut, block)
                    case Ready(waited_s=waited_s) if self._ahead is not None:
                        self._note_idle(waited_s)
                        self._take(end, cut, self._ahead)
                        self._ahead = None
                    case Complete() as complete if self._ahead is None:
                        if self._is_vouched(channel, complete):
                            self._note_idle(complete.waited_s)
                            self._accept(channel, complete)
                            return
                    case Alive():
                        continue
                    case other:
                        raise LinkBroken(f"{type(other).__name__} out of turn")
        except (KVTransferError, LinkBroken, OSError) as error:
            reason = f"receiving KV from {self.receipt.source.node_id}: {error}"
            hold.fail(reason, fault_of(error))
            self._tell(channel, reason)
            raise

    def _note_idle(self, waited_s: float) -> None:
        """Both ends waited for the sender's engine: the sender so long, this one since its last block.

        Called when the frame is there: what is done with it is no waiting.
        """
        idle_s = min(waited_s, time.monotonic() - self._since_s)
        self._idle_s += idle_s
        self._since_s += idle_s  # no time counts twice, whatever a peer says

    def _slots_of(self, block: Block) -> np.ndarray:
        return self.receipt.slots[self._num_there : self._num_there + block.count]

    def _expect(self, channel: Channel, end: ReceivingEnd, cut: Cut, block: Block) -> None:
        """Get the next block as far as that touches no slots."""
        receipt = self.receipt
        first, stop = self._num_there, self._num_there + block.count
        is_next = block.index == len(self._chunks) and block.start == receipt.start + first
        if not is_next or not 1 <= block.count <= cut.tokens_per_block or stop > len(receipt.slots):
            raise LinkBroken(
                f"block {block.index} of {block.count} tokens from {block.start}; expected was block "
                f"{len(self._chunks)} from {receipt.start + first} with 1..{cut.tokens_per_block} tokens of "
                f"{len(receipt.slots) - first} left"
            )
        end.pull(channel, block, block.count * cut.rows.token_bytes, receipt.node.limits.silence_s)
        self._chunks.append((block.start, block.count))
        end.prepare(self._slots_of(block))
        if block.is_ahead and stop == len(receipt.slots):
            self._agreed()
        receipt.free.wait()

    def _take(self, end: ReceivingEnd, cut: Cut, block: Block) -> None:
        """Write a block that has been got into its slots."""
        receipt = self.receipt
        with receipt.hold.touching():
            end.unpack(self._slots_of(block))
        self._num_there += block.count
        self._last_s = self._since_s = time.monotonic()
        receipt.hold.moved(block.count * cut.rows.token_bytes)
        self._owes_ack = True

    def _acknowledge(self, channel: Channel) -> None:
        """Acknowledge a block, unless all is here with a frame behind it: the last word has an answer."""
        is_last = self._num_there == len(self.receipt.slots)
        if not self._owes_ack or (is_last and channel.has_news(0.0)):
            return
        channel.send(Ack(), self.receipt.node.limits.silence_s)
        self._owes_ack = False
        if is_last:  # while the sender prepares its last word
            self._agreed()

    def _is_vouched(self, channel: Channel, complete: Complete) -> bool:
        """Whether the sender's slots were its own until we had read them; if not, it is asked again."""
        if not complete.kept_until_s:
            if self._owes_ack:
                raise LinkBroken("Complete out of turn")
            return True
        if self._last_s <= complete.kept_until_s:
            return True
        channel.send(Late(), self.receipt.node.limits.silence_s)
        self._owes_ack = False
        return False

    def _agreed(self) -> bytes:
        """The digest of what has come, all of which is announced; as early as there is time for it."""
        if not self._digest:
            receipt = self.receipt
            self._digest = digest(receipt.node.layout, self.rows.heads, receipt.token_ids, self._chunks)
        return self._digest

    def _accept(self, channel: Channel, complete: Complete) -> None:
        receipt = self.receipt
        ours = {
            "ticket": receipt.source.ticket,
            "source_epoch": receipt.source.epoch,
            "target_epoch": receipt.node.epoch,
            "num_tokens": len(receipt.token_ids),
            "digest": self._agreed(),
        }
        wrong = [name for name, value in ours.items() if getattr(complete, name) != value]
        if self._num_there != len(receipt.slots):
            wrong.append(f"{self._num_there} of {len(receipt.slots)} tokens came")
        if not receipt.is_first_token(complete.first_token_id):
            wrong.append("another rank has another first token")
        if wrong:
            text = f"the sender's end does not match: {', '.join(wrong)}"
            raise KVTransferError(text, fault="not_accepted")
        arrival = KVArrival(request_id=receipt.hold.request_id, first_token_id=complete.first_token_id)
        receipt.hold.end_part(arrival, self._idle_s)
        channel.send(Accepted(), receipt.node.limits.silence_s)
        receipt.hold.log()

    def _tell(self, channel: Channel, reason: str) -> None:
        """Let the sender know at once, if it still listens."""
        try:
            channel.send(Rejected(reason=reason[:500]), self.receipt.node.limits.handshake_s)
        except KVTransferError:
            pass
