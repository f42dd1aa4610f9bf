"""The lane over NIXL, which is UCX: RDMA between hosts, NVLink between GPUs, whatever else UCX finds.

The sender packs into staging memory on the pool's device; the receiver reads it into staging memory of its
own (`nixl_agent.py`). The library is loaded, and its agent started, when the first block needs it. UCX asks
for no token: it is no lane for a network where strangers send. Runs in the threads of a KV link.
"""

import importlib.metadata
import importlib.util
import logging
import threading
from pathlib import Path

import msgspec
import numpy as np
from torch import Tensor

from lightllm.cluster_link import LinkBroken
from lightllm.transfer.channel import Channel
from lightllm.transfer.frames import Block
from lightllm.transfer.lane import (
    WINDOW,
    Cut,
    Lane,
    LaneUnavailable,
    ReceivingEnd,
    SendingEnd,
    StagedReceiver,
    StagedSender,
)
from lightllm.transfer.nixl_agent import Agent, Memory, Place
from lightllm.transfer.plan import KVRows

logger = logging.getLogger(__name__)

PACKAGE = "nixl"
INSTALL = "pip install 'lightllm[pd]'"
# A read takes 0.4 ms and the time for its bytes, so that blocks are large; a sender has memory for four.
GPU_BLOCK_BYTES = 64 * 1024 * 1024
RDMA_DEVICES = Path("/sys/class/infiniband")


class Offer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a receiver must know to try: the library there, or why it does not work there.

    `block_bytes`: of the sender's blocks, which depend on its device; the receiver's must be the same.
    """

    version: str
    block_bytes: int
    obstacle: str = ""


class NixlLane(Lane):
    """See the module."""

    def __init__(self, rows: KVRows, block_bytes: int | None = None) -> None:
        super().__init__(rows, block_bytes or (GPU_BLOCK_BYTES if rows.device.type == "cuda" else None))
        if importlib.util.find_spec(PACKAGE) is None:
            raise LaneUnavailable(f"the package {PACKAGE} is not installed: {INSTALL}")
        self.version = importlib.metadata.version(PACKAGE)
        self.obstacle = ""
        self._agent: Agent | None = None
        self._lock = threading.Lock()

    @staticmethod
    def check_worth() -> None:
        if not any(RDMA_DEVICES.glob("*")):
            raise LaneUnavailable(
                "there is no RDMA device, and without one the lane tcp is faster; --kv_transport nixl takes "
                "it all the same"
            )

    def start(self) -> None:
        self.agent()

    def close(self) -> None:
        with self._lock:
            agent, self._agent = self._agent, None
            self.obstacle = self.obstacle or "this node stops"
        if agent is not None:
            agent.close()

    def agent(self) -> Agent:
        """The agent of this process, started on first need.

        Raises:
            LaneUnavailable: it does not start, which is tried once.
        """
        with self._lock:
            if self._agent is None and not self.obstacle:
                try:
                    self._agent = Agent(PACKAGE, self.rows.device)
                except LaneUnavailable as error:
                    self.obstacle = str(error)
                    logger.error("KV link: lane nixl: %s", error)
            if self._agent is None:
                raise LaneUnavailable(self.obstacle)
            return self._agent

    def open_sender(self) -> SendingEnd:
        return _Sender(self)

    def open_receiver(self, fields: bytes, cut: Cut) -> ReceivingEnd:
        try:
            offer = msgspec.msgpack.decode(fields, type=Offer)
        except msgspec.DecodeError as error:
            raise LaneUnavailable(f"its offer is not this version's: {error}") from error
        if offer.obstacle:
            raise LaneUnavailable(f"there: {offer.obstacle}")
        if offer.version != self.version:
            raise LaneUnavailable(f"{PACKAGE} {offer.version} there, {self.version} here: install equal ones")
        if offer.block_bytes != self.most_bytes:
            sizes = f"{offer.block_bytes} bytes there, {self.most_bytes} here"
            raise LaneUnavailable(f"blocks of {sizes}: one node's KV is on a GPU, the other's is not")
        return _Receiver(self, cut, self.agent())


class _Sender(StagedSender):
    def __init__(self, lane: NixlLane) -> None:
        super().__init__(lane)
        self._nixl = lane
        self._agent: Agent | None = None
        self._memory: Memory | None = None

    def offer(self) -> bytes:
        lane = self._nixl
        offer = Offer(version=lane.version, block_bytes=lane.most_bytes, obstacle=lane.obstacle)
        return msgspec.msgpack.encode(offer)

    def staging(self, index: int) -> Tensor:
        if self._memory is None:  # only if the receiver has taken this lane
            self._agent = self._nixl.agent()
            self._memory = self._agent.take(WINDOW * self.lane.block_bytes)
        start = index % WINDOW * self.cut.block_bytes
        return self._memory.data[start : start + self.cut.block_bytes]

    def pack(self, index: int, slots: np.ndarray) -> bytes:
        super().pack(index, slots)
        assert self._memory is not None
        return b"" if index else msgspec.msgpack.encode(self._memory.place)

    def push(self, channel: Channel, index: int, size: int, limit_s: float) -> None:
        return  # it lies where the receiver reads

    def close(self) -> None:
        if self._agent is not None and self._memory is not None:
            self._agent.give_back(self._memory)
            self._memory = None


class _Receiver(StagedReceiver):
    def __init__(self, lane: NixlLane, cut: Cut, agent: Agent) -> None:
        super().__init__(lane, cut)
        self._agent = agent
        self._memory = agent.take(lane.block_bytes)
        self._source: Place | None = None

    def fetch(self, channel: Channel, block: Block, size: int, limit_s: float) -> Tensor:
        if block.fields:
            try:
                self._source = msgspec.msgpack.decode(block.fields, type=Place)
            except msgspec.DecodeError as error:
                raise LinkBroken(f"a place that does not belong here: {error}") from error
        if self._source is None:
            raise LinkBroken("a block whose place was not said")
        offset = block.index % WINDOW * self.cut.block_bytes
        self._agent.read(self._source, offset, self._memory, size, channel, limit_s)
        return self._memory.data[:size]

    def close(self) -> None:
        self._agent.give_back(self._memory)
