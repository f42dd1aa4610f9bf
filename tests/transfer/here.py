"""Lanes between two nodes of this process: slots read in place, as by p2p; and staging memory."""

from collections import deque

import msgspec
import numpy as np
import torch

from lightllm.transfer.lane import WINDOW, Lane, ReceivingEnd, SendingEnd, StagedReceiver, StagedSender


class HereLane(Lane):
    """No handle is needed: all lanes of the process are in a list, and an offer is a place in it."""

    LANES: list["HereLane"] = []

    def __init__(self, rows, block_bytes=None):
        super().__init__(rows, block_bytes)
        self.LANES.append(self)

    def open_sender(self):
        return _Sender(self.LANES.index(self))

    def open_receiver(self, fields, cut):
        return _Receiver(self.LANES[msgspec.msgpack.decode(fields)], cut)


class _Sender(SendingEnd):
    is_in_place = True

    def __init__(self, number):
        self.number = number

    def offer(self):
        return msgspec.msgpack.encode(self.number)

    def pack(self, index, slots):
        return slots.tobytes()

    def push(self, channel, index, size, limit_s):
        return

    def close(self):
        return


class _Receiver(ReceivingEnd):
    def __init__(self, peer, cut):
        self.peer, self.cut = peer, cut

    def pull(self, channel, block, size, limit_s):
        self.source_slots = np.frombuffer(block.fields, dtype=np.int64)
        self.block = torch.empty(size, dtype=torch.uint8)
        self.prepared = []

    def prepare(self, slots):
        self.prepared = slots.tolist()

    def unpack(self, slots):
        assert self.prepared == slots.tolist()
        self.peer.rows.part(self.cut.rows.heads).pack(self.source_slots, self.block)
        self.cut.rows.unpack(slots, self.block)

    def close(self):
        return


class TwoAtOnceLane(Lane):
    """A lane with staging memory whose receiver has two blocks on their way, and reads each late.

    Attributes:
        events: what its receivers did, with the number of the block.
    """

    LANES: list["TwoAtOnceLane"] = []

    def __init__(self, rows, block_bytes=None):
        super().__init__(rows, block_bytes)
        self.LANES.append(self)
        self.senders = []
        self.events = []

    def open_sender(self):
        self.senders.append(_StagedHere(self))
        return self.senders[-1]

    def open_receiver(self, fields, cut):
        lane, sender = msgspec.msgpack.decode(fields)
        return _TwoAtOnce(self, cut, self.LANES[lane].senders[sender])


class _StagedHere(StagedSender):
    def __init__(self, lane):
        super().__init__(lane)
        self.memory = torch.empty(WINDOW, lane.block_bytes, dtype=torch.uint8)

    def offer(self):
        return msgspec.msgpack.encode((self.lane.LANES.index(self.lane), self.lane.senders.index(self)))

    def staging(self, index):
        return self.memory[index % WINDOW]

    def push(self, channel, index, size, limit_s):
        return

    def close(self):
        return


class _TwoAtOnce(StagedReceiver):
    depth = 2

    def __init__(self, lane, cut, sender):
        super().__init__(lane, cut)
        self.sender = sender
        self.memory = torch.empty(self.depth, lane.block_bytes, dtype=torch.uint8)
        self.blocks = deque()

    def fetch(self, channel, block, size, limit_s):
        self.lane.events.append(("pull", block.index))
        self.blocks.append((block.index, size))
        return self.memory[block.index % self.depth, :size]

    def arrive(self, channel, limit_s):
        index, size = self.blocks.popleft()
        self.memory[index % self.depth, :size] = self.sender.memory[index % WINDOW, :size]
        self.lane.events.append(("arrive", index))

    def close(self):
        self.lane.events.append(("left", len(self.blocks)))
