"""A lane between two nodes of this process: the receiver reads the sender's slots itself, as by p2p."""

import msgspec
import numpy as np
import torch

from lightllm.transfer.lane import Lane, ReceivingEnd, SendingEnd


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
