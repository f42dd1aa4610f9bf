"""DeviceRows: a KV pool in a device's memory, whose rows are packed and unpacked by kernels.

The work runs in queues beside that of steps, one for each of a few threads at a time, and has been done on
the device when a call returns: only the transfer's thread waits for it. Needs triton.
"""

import queue
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightllm.device.base import Device
from lightllm.device.kv_pool import KVPool
from lightllm.errors import KVTransferError
from lightllm.kernels.kv_rows import copy_rows, prepare_pull, word_type
from lightllm.transfer.plan import KVRows

NUM_QUEUES = 4
MIN_STAGED_SLOTS = 16_384  # room for the slots of most blocks: pinning memory anew takes longer than a block


class _Queue:
    """A queue of work, memory of the device for what is copied in it to or from the host, and for slots."""

    def __init__(self, entered: AbstractContextManager[object], is_pinned: bool) -> None:
        self.entered = entered
        self._is_pinned = is_pinned
        self._scratch: Tensor | None = None
        self._slots = torch.empty(0, dtype=torch.int64)

    def stage(self, *lists: np.ndarray) -> tuple[Tensor, list[int]]:
        """Lists of slots one behind the other, from where one copy takes them all, and where each begins.

        That is a multiple of 16 bytes, as it is where memory is allocated: Triton's kernels are compiled for
        either case.
        """
        starts = [0]
        for slots in lists:
            starts.append(starts[-1] + len(slots) + len(slots) % 2)
        if len(self._slots) < starts[-1]:
            size = max(starts[-1], MIN_STAGED_SLOTS)
            self._slots = torch.empty(size, dtype=torch.int64, pin_memory=self._is_pinned)
        staged = self._slots[: starts[-1]]
        for slots, start in zip(lists, starts, strict=False):
            staged.numpy()[start : start + len(slots)] = slots
        return staged, starts[:-1]

    def scratch(self, size: int, device: torch.device) -> Tensor:
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8, device=device)
        return self._scratch[:size]


class DeviceRows(KVRows):
    """See the module. More threads than NUM_QUEUES wait for each other, whatever heads they move.

    They wait for the device awake, each on a core of its own: a millisecond or a few for a block in its
    memory or over NVLink, some tens for a large one over PCIe.

    Args:
        queues: of other rows of the pool, that do the work of these, too.
    """

    def __init__(
        self,
        pool: KVPool,
        device: Device,
        first_head: int = 0,
        heads: range | None = None,
        queues: "queue.SimpleQueue[_Queue] | None" = None,
    ) -> None:
        super().__init__(pool, first_head, heads)
        self._device = device
        self._words = word_type(self.head_bytes)
        first, stop = (edge // self._words.itemsize for edge in self.row_range)
        storage = pool.storage.view(-1).view(torch.uint8)
        self._rows = self._as_rows(storage, pool.num_slots)[:, :, first:stop]
        self._queues = queues or queue.SimpleQueue()
        if queues is None:
            for _ in range(NUM_QUEUES):
                self._queues.put(_Queue(device.side_queue(), device.is_async))

    def _part(self, heads: range) -> "DeviceRows":
        return DeviceRows(self.pool, self._device, self.pool_heads.start, heads, self._queues)

    def pack(self, slots: np.ndarray, block: Tensor) -> None:
        size = len(slots) * self.token_bytes
        with self._work() as work:
            is_direct = block.device == self.device
            target = block[:size] if is_direct else work.scratch(size, self.device)
            (source_slots,) = self._upload(work, slots)
            copy_rows(self._rows, source_slots, self._as_rows(target, len(slots)), None)
            if not is_direct:
                block[:size].copy_(target, non_blocking=True)

    def unpack(self, slots: np.ndarray, block: Tensor) -> None:
        with self._work() as work:
            source = block
            if block.device != self.device:
                source = work.scratch(block.numel(), self.device)
                source.copy_(block, non_blocking=True)
            (target_slots,) = self._upload(work, slots)
            copy_rows(self._as_rows(source, len(slots)), None, self._rows, target_slots)

    def prepare_pull(
        self, address: int, num_slots: int, heads: range, source_slots: np.ndarray, slots: np.ndarray
    ) -> Callable[[], None]:
        """Prepare to copy these heads from slots of another pool, [n] int64, into slots of this one.

        Args:
            address: where that pool's storage of `num_slots` begins, readable by this device.
            heads: the model's KV heads that it holds.

        Returns:
            What does it, and returns when it is done; once.
        """
        first = (self.heads.start - heads.start) * self.head_bytes
        stride = len(heads) * self.head_bytes // self._words.itemsize
        with self._work() as work:
            source, target = self._upload(work, source_slots, slots)
            launch = prepare_pull(address + first, num_slots, stride, source, self._rows, target)
        return partial(self._run, launch)

    def _run(self, launch: Callable[[], None]) -> None:
        with self._work():
            launch()

    def read(self, address: int, size: int) -> bytes:
        """The bytes at an address that is readable by this device."""
        with self._work() as work:
            found = work.scratch(size, self.device)
            (none,) = self._upload(work, np.zeros(1, dtype=np.int64))
            prepare_pull(address, 1, size, none, found.view(1, 1, size), None)()
            return found.cpu().numpy().tobytes()

    def host_memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._device.is_async)

    def pin(self, memory: Tensor) -> None:
        self._device.pin(memory)

    def unpin(self, memory: Tensor) -> None:
        self._device.unpin(memory)

    @contextmanager
    def _work(self) -> Iterator[_Queue]:
        """Take a queue, call for work in it, and wait until that is done.

        Raises:
            KVTransferError: the device has failed, or has no memory left.
        """
        work = self._queues.get()
        try:
            with work.entered:
                try:
                    yield work
                finally:
                    self._device.mark(is_urgent=True).wait()
        except RuntimeError as error:
            raise KVTransferError(f"moving KV on {self._device.label}: {error}") from error
        finally:
            self._queues.put(work)

    def _upload(self, work: _Queue, *lists: np.ndarray) -> list[Tensor]:
        """Lists of slots on the device; the device's own way of uploading is for steps."""
        staged, starts = work.stage(*lists)
        uploaded = staged.to(self.device, non_blocking=True, copy=True)  # what is staged is used again
        return [uploaded[i : i + len(slots)] for i, slots in zip(starts, lists, strict=True)]

    def _as_rows(self, memory: Tensor, num_rows: int) -> Tensor:
        """[num_tensors, num_rows, row] words."""
        return memory.view(self._words).view(self.num_tensors, num_rows, -1)
