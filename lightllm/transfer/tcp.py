"""The lane between any two hosts: the bytes of a block follow its frame on the same TCP connection."""

from torch import Tensor

from lightllm.transfer.channel import Channel
from lightllm.transfer.frames import Block
from lightllm.transfer.lane import Cut, Lane, ReceivingEnd, SendingEnd, StagedReceiver, StagedSender


class TcpLane(Lane):
    """See the module."""

    def open_sender(self) -> SendingEnd:
        return _Sender(self)

    def open_receiver(self, fields: bytes, cut: Cut) -> ReceivingEnd:
        return _Receiver(self, cut)


class _Sender(StagedSender):
    def __init__(self, lane: Lane) -> None:
        super().__init__(lane)
        # One is enough: when `push` returns, the system has its own copy.
        self._staging = lane.rows.host_memory(lane.block_bytes)

    def offer(self) -> bytes:
        return b""

    def staging(self, index: int) -> Tensor:
        return self._staging

    def push(self, channel: Channel, index: int, size: int, limit_s: float) -> None:
        channel.send_bytes(self._staging[:size].numpy().data, limit_s)

    def close(self) -> None:
        return


class _Receiver(StagedReceiver):
    def __init__(self, lane: Lane, cut: Cut) -> None:
        super().__init__(lane, cut)
        self._staging = lane.rows.host_memory(cut.block_bytes)

    def fetch(self, channel: Channel, block: Block, size: int, limit_s: float) -> Tensor:
        data = self._staging[:size]
        channel.receive_into(data.numpy(), limit_s)
        return data

    def close(self) -> None:
        return
