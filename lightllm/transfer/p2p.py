"""The lane between GPUs of one host, or processes on one GPU: the receiver reads the sender's pool itself.

The sender offers a handle of its pool, and each block's frame says in which of its slots the block lies. The
receiver opens the handle once and copies slots to slots, over NVLink or PCIe, without staging memory; its
kernel runs in a queue of its own, while it holds the slots that it writes. The sender's slots stay as they
are until all blocks are acknowledged, unless it gives the transfer up; then what was read last may be of
something else, but no COMPLETE follows, and so nobody uses it. A COMPLETE that does not wait for the last of
these acknowledgements promises to keep the slots up to a moment: what was read by then is right.

A label at the end of the pool, drawn anew for each, proves that the two mean the same memory: it is compared
when a pool is opened. A later offer with the same label is one of the same pool, which stays mapped here
whatever becomes of the number of its process. A pool is closed as soon as its process has ended, since what
is open keeps the memory of the GPU taken.
"""

import hmac
import logging
import os
import secrets
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import msgspec
import numpy as np
import torch

from lightllm.cluster_link import LinkBroken
from lightllm.device.cuda_ipc import HANDLE_BYTES, CudaIpc
from lightllm.device.kv_pool import LABEL_BYTES
from lightllm.errors import KVTransferError
from lightllm.transfer.channel import MAX_KV_FRAME_BYTES, Channel
from lightllm.transfer.frames import Block
from lightllm.transfer.lane import Cut, Lane, LaneUnavailable, ReceivingEnd, SendingEnd
from lightllm.transfer.plan import KVRows

if TYPE_CHECKING:
    from lightllm.transfer.device_rows import DeviceRows

logger = logging.getLogger(__name__)

SLOT = np.dtype("<i4")
MAX_BLOCK_TOKENS = MAX_KV_FRAME_BYTES // 2 // SLOT.itemsize
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NAMESPACES = Path("/proc/self/ns")

Handle = Annotated[bytes, msgspec.Meta(min_length=HANDLE_BYTES, max_length=HANDLE_BYTES)]
Label = Annotated[bytes, msgspec.Meta(min_length=LABEL_BYTES, max_length=LABEL_BYTES)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Slots = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]


class PoolOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the sender's pool is found, and what stands at its end.

    Attributes:
        host: this boot of the machine, and in it where numbers of processes, and times, mean the same.
        pid: of the process that holds the pool.
        handle, offset: see Exported.
        num_slots: of the pool.
        first_head, num_heads: the model's KV heads that it holds.
    """

    host: str
    pid: int
    handle: Handle
    offset: Count
    num_slots: Slots
    first_head: Count
    num_heads: Slots
    label: Label

    @property
    def heads(self) -> range:
        """The model's KV heads that the pool holds."""
        return range(self.first_head, self.first_head + self.num_heads)


class P2PLane(Lane):
    """See the module. Blocks are large, since each costs a frame, a kernel and a wait.

    An abort waits for the blocks that are being copied, one after the other: some milliseconds over NVLink.
    """

    BLOCK_BYTES = 2 * 1024**3

    def __init__(self, rows: KVRows, block_bytes: int | None = None) -> None:
        if rows.device.type != "cuda":
            raise LaneUnavailable(f"the KV is on a {rows.device.type}, not on a GPU")
        super().__init__(rows, block_bytes)
        self.device_rows = cast("DeviceRows", rows)
        pool = rows.pool
        label = secrets.token_bytes(LABEL_BYTES)
        pool.label.copy_(torch.tensor(list(label), dtype=torch.uint8))
        try:
            self.host = this_host()
            self.ipc = CudaIpc(rows.device)
            exported = self.ipc.export(pool.storage)
        except OSError as error:
            raise LaneUnavailable(
                f"this process cannot share memory of its GPU: {error}; PYTORCH_CUDA_ALLOC_CONF must leave "
                "expandable_segments and backend alone"
            ) from error
        offer = PoolOffer(
            host=self.host,
            pid=os.getpid(),
            handle=exported.handle,
            offset=exported.offset,
            num_slots=pool.num_slots,
            first_head=rows.heads.start,
            num_heads=len(rows.heads),
            label=label,
        )
        self.offer = msgspec.msgpack.encode(offer)
        self._peers: dict[bytes, PeerPool] = {}
        self._lock = threading.Lock()

    def cut(self, rows: KVRows) -> Cut:
        cut = super().cut(rows)
        return cut._replace(tokens_per_block=min(cut.tokens_per_block, MAX_BLOCK_TOKENS))

    def open_sender(self) -> SendingEnd:
        return _Sender(self.offer)

    def open_receiver(self, fields: bytes, cut: Cut) -> ReceivingEnd:
        with self._lock:
            peer = self._peers.get(fields)
            if peer is None or peer.is_closed:
                peer = PeerPool(self, _decoded(fields))
                self._peers = {offer: pool for offer, pool in self._peers.items() if not pool.is_closed}
                try:
                    peer.check()
                except LaneUnavailable:
                    # The next transfer opens it anew: this may be what a dead process of that number had.
                    peer.stop()
                    raise
                self._peers[fields] = peer
        theirs, ours = peer.offer.heads, cut.rows.heads
        if ours.start < theirs.start or ours.stop > theirs.stop:
            raise LaneUnavailable(f"the sender's pool has KV heads {_shown(theirs)}, not {_shown(ours)}")
        return _Receiver(peer, cast("DeviceRows", cut.rows))

    def close(self) -> None:
        with self._lock:
            for peer in self._peers.values():
                peer.stop()
            self._peers.clear()


class PeerPool:
    """The pool of another process, open for all its transfers until that process ends.

    Attributes:
        address: where its storage begins, to be read as `reading` says.

    Raises:
        LaneUnavailable: it cannot be read here.
    """

    def __init__(self, lane: P2PLane, offer: PoolOffer) -> None:
        if offer.host != lane.host:
            raise LaneUnavailable("the sender is on another host, or in another container")
        if offer.pid == os.getpid():
            raise LaneUnavailable("the sender's GPU memory is this process's own")
        try:
            self._process = os.pidfd_open(offer.pid)
        except OSError as error:
            raise LaneUnavailable(f"the sender's process {offer.pid} is not to be seen: {error}") from error
        try:
            opened = lane.ipc.open(offer.handle)
        except OSError as error:
            os.close(self._process)
            raise LaneUnavailable(f"the sender's GPU memory cannot be read by this GPU: {error}") from error
        rows = lane.device_rows
        self.offer = offer
        self._lane, self._opened = lane, opened
        self._lock = threading.Lock()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        head_bytes = rows.num_tensors * rows.head_bytes
        self._storage_bytes = offer.num_slots * offer.num_heads * head_bytes
        self.address = opened.address + offer.offset
        self.is_closed = False
        threading.Thread(target=self._watch, name="kv-peer", daemon=True).start()

    def check(self) -> None:
        """Make sure that what is open here is what the sender offers.

        Raises:
            LaneUnavailable: it is not.
        """
        end = self.offer.offset + self._storage_bytes + LABEL_BYTES
        if end > self._opened.size:
            raise LaneUnavailable(f"the sender's pool ends at byte {end} of {self._opened.size}")
        try:
            with self.reading() as address:
                found = self._lane.device_rows.read(address + self._storage_bytes, LABEL_BYTES)
        except KVTransferError as error:
            raise LaneUnavailable(f"the sender's GPU memory cannot be read by this GPU: {error}") from error
        if not hmac.compare_digest(found, self.offer.label):
            raise LaneUnavailable("what lies there is not the sender's pool")

    @contextmanager
    def reading(self) -> Iterator[int]:
        """Read at the address where the storage begins; the pool is not closed meanwhile.

        Raises:
            KVTransferError: the sender's process has ended.
        """
        with self._lock:
            if self.is_closed:
                raise KVTransferError("the sender's process has ended")
            yield self.address

    def stop(self) -> None:
        """Close the pool now."""
        with self._lock:
            if not self.is_closed:
                os.eventfd_write(self._stop, 1)

    def _watch(self) -> None:
        """Close the pool when its process ends, or this node does."""
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        poll.poll()
        with self._lock:
            self.is_closed = True
            try:
                self._lane.ipc.close(self._opened.address)
            except OSError as error:
                logger.warning("KV link: GPU memory of process %d stays open: %s", self.offer.pid, error)
            os.close(self._process)
            os.close(self._stop)


class _Sender(SendingEnd):
    is_in_place = True

    def __init__(self, offer: bytes) -> None:
        self._offer = offer

    def offer(self) -> bytes:
        return self._offer

    def pack(self, index: int, slots: np.ndarray) -> bytes:
        return slots.astype(SLOT).tobytes()

    def push(self, channel: Channel, index: int, size: int, limit_s: float) -> None:
        return  # it lies where the receiver looks

    def close(self) -> None:
        return


class _Receiver(ReceivingEnd):
    def __init__(self, peer: PeerPool, rows: "DeviceRows") -> None:
        self._peer, self._rows = peer, rows
        self._source_slots = np.empty(0, dtype=np.int64)
        self._copy: Callable[[], None] | None = None

    def pull(self, channel: Channel, block: Block, size: int, limit_s: float) -> None:
        if len(block.fields) != block.count * SLOT.itemsize:
            raise LinkBroken(f"{len(block.fields)} bytes of slots for {block.count} tokens")
        slots = np.frombuffer(block.fields, dtype=SLOT).astype(np.int64)
        if slots.min() < 0 or slots.max() >= self._peer.offer.num_slots:
            raise LinkBroken(f"slots {slots.min()}..{slots.max()} of {self._peer.offer.num_slots}")
        self._source_slots, self._copy = slots, None

    def prepare(self, slots: np.ndarray) -> None:
        # Not as `reading`, which keeps other transfers from it: this takes long where it compiles.
        address, offer = self._peer.address, self._peer.offer
        self._copy = self._rows.prepare_pull(address, offer.num_slots, offer.heads, self._source_slots, slots)

    def unpack(self, slots: np.ndarray) -> None:
        assert self._copy is not None, "a block is prepared first"
        with self._peer.reading():
            self._copy()

    def close(self) -> None:
        return


def this_host() -> str:
    """See PoolOffer.

    Raises:
        OSError: the system does not tell.
    """
    places = [NAMESPACES / name for name in ("pid", "time")]
    names = [os.readlink(place) for place in places if place.is_symlink()]  # older kernels have one time only
    return " ".join([BOOT_ID.read_text("ascii").strip(), *names])


def _shown(heads: range) -> str:
    return f"{heads.start}..{heads.stop - 1}"


def _decoded(fields: bytes) -> PoolOffer:
    try:
        return msgspec.msgpack.decode(fields, type=PoolOffer)
    except msgspec.DecodeError as error:
        raise LaneUnavailable(f"the sender's offer is none: {error}") from error
