"""SlotAllocator: which KV slots are free, with a taste for contiguous ones.

A slot is one token's KV in all layers, named by an int in 1..num_slots; slot 0 is the padding dummy and
never handed out. The pool is divided into regions of 64 slots. A request grows inside its region and then
moves to a wholly free one, so that its KV lies in long runs which attention can read as views; single slots
elsewhere are taken only when no region is wholly free. Lower slots go first, so that a lazily touched pool
stays small.
Knows nothing of requests, tokens or trees.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

REGION_SIZE = 64
_FREE_REGION = bytes([REGION_SIZE])


class SlotAllocator:
    """Hand out and take back slots; every operation costs a few C calls per contiguous run.

    `num_slots` is the capacity, `num_free` what is left of it.
    """

    def __init__(self, num_slots: int) -> None:
        num_regions = num_slots // REGION_SIZE + 1
        size = num_regions * REGION_SIZE
        self.num_slots = num_slots
        self.num_free = num_slots
        # One byte per slot, and one that is never free behind the last region.
        self._is_free = bytearray(b"\0" + b"\1" * num_slots)
        self._is_free.extend(bytes(size + 1 - len(self._is_free)))
        # Free slots per region (REGION_SIZE: wholly free), and a region behind the last that has none.
        regions = range(num_regions)
        self._free_counts = bytearray(
            self._is_free.count(1, region * REGION_SIZE, (region + 1) * REGION_SIZE) for region in regions
        )
        self._free_counts.append(0)
        # Nothing below these two is free: where to start searching.
        self._lowest_slot = 1
        self._lowest_region = 0
        # Slot i at index i: a run of slots is a slice of it.
        self._ramp = array("i", range(size + 1))

    def alloc(self, count: int, last_slot: int = -1) -> array[int] | None:
        """Take `count` slots, if possible the ones behind `last_slot` (-1: none yet).

        Returns:
            The slots in the order in which positions should use them; None if fewer than `count` are free.
        """
        if count > self.num_free:
            return None
        slots = array("i")
        start = last_slot + 1
        while count:
            start = self._choose(start)
            region = start // REGION_SIZE
            num_regions = self._count_free_regions(start, count // REGION_SIZE)
            if num_regions:
                stop = start + num_regions * REGION_SIZE
                self._free_counts[region : region + num_regions] = bytes(num_regions)
            else:
                stop = min(start + count, (region + 1) * REGION_SIZE)
                used = self._is_free.find(0, start, stop)
                if used != -1:
                    stop = used
                self._free_counts[region] -= stop - start
            size = stop - start
            self._is_free[start:stop] = bytes(size)
            self.num_free -= size
            slots.extend(self._ramp[start:stop])
            count -= size
            start = stop
        return slots

    def alloc_each(self, last_slots: list[int]) -> list[int]:
        """Take one slot behind each of `last_slots`: the fast path of a decode step.

        At least `len(last_slots)` slots must be free.
        """
        assert len(last_slots) <= self.num_free, (
            f"{len(last_slots)} slots asked for, {self.num_free} are free"
        )
        is_free, free_counts = self._is_free, self._free_counts
        num_regions = len(free_counts)
        slots = []
        for last_slot in last_slots:
            slot = last_slot + 1
            if not (slot % REGION_SIZE and is_free[slot]):
                if self._lowest_region < num_regions:
                    slot = self._choose(slot)
                else:  # no region is wholly free: the usual case of a pool that caches all it can
                    slot = self._lowest_slot = is_free.find(1, self._lowest_slot)
            is_free[slot] = 0
            free_counts[slot // REGION_SIZE] -= 1
            slots.append(slot)
        self.num_free -= len(slots)
        return slots

    def free(self, slots: array[int]) -> None:
        """Take back slots in any order; none of them may be free already."""
        index, end = 0, len(slots)
        while index < end:
            start = slots[index]
            region = start // REGION_SIZE
            size = min(end - index, (region + 1) * REGION_SIZE - start)
            while slots[index : index + size] != self._ramp[start : start + size]:
                size //= 2
            stop = start + size
            assert self._is_free.find(1, start, stop) == -1, (
                f"slots {start}..{stop - 1} hold a free one already"
            )
            self._is_free[start:stop] = b"\1" * size
            self._free_counts[region] += size
            self._lowest_slot = min(self._lowest_slot, start)
            if self._free_counts[region] == REGION_SIZE:
                self._lowest_region = min(self._lowest_region, region)
            index += size
        self.num_free += end

    def free_slots(self) -> Iterable[int]:
        """All free slots in ascending order; checks the counters on the way (for integrity checks)."""
        free = [slot for slot, is_free in enumerate(self._is_free) if is_free]
        assert len(free) == self.num_free, f"{len(free)} slots are free, num_free says {self.num_free}"
        for region, count in enumerate(self._free_counts):
            true_count = self._is_free.count(1, region * REGION_SIZE, (region + 1) * REGION_SIZE)
            assert true_count == count, (
                f"region {region} has {true_count} free slots, its counter says {count}"
            )
        return free

    def _count_free_regions(self, start: int, limit: int) -> int:
        """How many regions from slot `start` on can be taken as a whole; not always all, but one if any."""
        region, offset = divmod(start, REGION_SIZE)
        if offset:
            return 0
        while limit and self._free_counts[region : region + limit] != _FREE_REGION * limit:
            limit //= 2
        return limit

    def _choose(self, next_slot: int) -> int:
        """Where to go on: at `next_slot` inside its region or in a free one, in a free region, anywhere."""
        starts_region = next_slot % REGION_SIZE == 0
        if self._is_free[next_slot] and not starts_region:
            return next_slot
        if starts_region and self._free_counts[next_slot // REGION_SIZE] == REGION_SIZE:
            return next_slot
        region = self._free_counts.find(REGION_SIZE, self._lowest_region)
        if region != -1:
            self._lowest_region = region
            return region * REGION_SIZE
        self._lowest_region = len(self._free_counts)
        self._lowest_slot = self._is_free.find(1, self._lowest_slot)
        return self._lowest_slot
