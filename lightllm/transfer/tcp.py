"""The lane between any two hosts: the bytes of a block follow its frame on the same TCP connection."""

import numpy as np

from lightllm.transfer.channel import Channel
from lightllm.transfer.lane import Lane, ReceivingEnd, SendingEnd


class TcpLane(Lane):
    """See the module."""

    @staticmethod
    def open_sender(block_bytes: int) -> SendingEnd:
        return _Sender(block_bytes)

    @staticmethod
    def open_receiver(fields: bytes, block_bytes: int) -> ReceivingEnd:
        return _Receiver(block_bytes)


class _Sender(SendingEnd):
    def __init__(self, block_bytes: int) -> None:
        # One is enough: when `push` returns, the system has its own copy.
        self._staging = np.empty(block_bytes, dtype=np.uint8)

    def offer(self) -> bytes:
        return b""

    def staging(self, index: int) -> np.ndarray:
        return self._staging

    def push(self, channel: Channel, index: int, size: int, limit_s: float) -> None:
        channel.send_bytes(self._staging[:size].data, limit_s)

    def close(self) -> None:
        return


class _Receiver(ReceivingEnd):
    def __init__(self, block_bytes: int) -> None:
        self._staging = np.empty(block_bytes, dtype=np.uint8)

    def pull(self, channel: Channel, index: int, size: int, limit_s: float) -> np.ndarray:
        block = self._staging[:size]
        channel.receive_into(block, limit_s)
        return block

    def close(self) -> None:
        return
