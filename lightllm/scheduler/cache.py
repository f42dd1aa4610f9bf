"""KV slots of requests: from the free list, shared through the radix tree, and back.

`PrefixCache` joins the tree with the slot allocator and keeps each request's interval table (request.py)
true. `NullPrefixCache` is the same without a memory: the scheduler never asks which one it holds. Neither
decides who gets slots; callers ask for no more than `num_available`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from lightllm.scheduler.radix_tree import Node, RadixTree
from lightllm.scheduler.request import Request
from lightllm.scheduler.slots import SlotAllocator

EVICTION_SHARE = 64
"""At least 1/64 of the pool is evicted at a time: whole regions become free, and decodes stay contiguous."""


class NullPrefixCache:
    """Slots without a memory: nothing is shared, and a released slot is free."""

    def __init__(self, num_slots: int) -> None:
        self._allocator = SlotAllocator(num_slots)

    @property
    def num_slots(self) -> int:
        """Capacity in tokens."""
        return self._allocator.num_slots

    @property
    def num_available(self) -> int:
        """Slots that can be handed out now: free ones, and cached ones that nobody uses."""
        return self._allocator.num_free + self.num_evictable

    @property
    def num_evictable(self) -> int:
        """Slots that hold cached tokens which nobody uses."""
        return 0

    def match_length(self, request: Request) -> int:
        """How many of the request's tokens would be found in the cache now."""
        return 0

    def acquire(self, request: Request) -> None:
        """Give a request its first slots: those of its longest cached prefix, from now on locked for it."""

    def share(self, request: Request) -> None:
        """Let others use all that is computed of the request's known tokens."""

    def extend(self, request: Request, count: int) -> None:
        """Append `count` slots to the request's."""
        self._make_room(count)
        slots = self._allocator.alloc(count, request.slots[-1] if request.slots else -1)
        assert slots is not None, f"{count} slots asked for, {self._allocator.num_free} are free"
        request.slots.extend(slots)

    def shrink(self, request: Request, count: int) -> None:
        """Take back the request's last `count` slots, which are not in the tree."""
        if count:
            assert len(request.slots) - count >= request.num_tree_tokens, f"{count} slots are too many"
            self._allocator.free(request.slots[-count:])
            del request.slots[-count:]
            request.num_unsent_slots = max(0, request.num_unsent_slots - count)

    def trim(self, request: Request) -> None:
        """Take back slots of positions behind the last token: nothing is computed there as it should be."""
        surplus = request.num_computed_tokens - len(request.token_ids) + 1
        self.shrink(request, surplus)
        request.num_computed_tokens -= surplus

    def extend_each(self, requests: list[Request]) -> list[int]:
        """Append one slot to each request, all of which have some; returns these slots in order."""
        self._make_room(len(requests))
        slots = self._allocator.alloc_each([request.slots[-1] for request in requests])
        for request, slot in zip(requests, slots, strict=True):
            request.slots.append(slot)
        return slots

    def release(self, request: Request) -> None:
        """Take back all slots of a request; what is computed stays cached while there is room."""
        self._allocator.free(request.slots[request.num_tree_tokens :])
        request.slots = array("i")
        request.num_tree_tokens = request.num_unsent_slots = request.num_computed_tokens = 0

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Check that each slot is free, cached or some request's, and exactly once.

        Args:
            requests: all that hold slots.

        Raises:
            AssertionError: with the numbers that differ.
        """
        self._check_slots(requests, array("i"))

    def _make_room(self, count: int) -> None:
        """Free slots until `count` are, if possible."""

    def _check_slots(self, requests: Iterable[Request], cached: array[int]) -> None:
        free = list(self._allocator.free_slots())
        owned = [slot for request in requests for slot in request.slots[request.num_tree_tokens :]]
        total = len(free) + len(cached) + len(owned)
        numbers = f"{len(free)} free + {len(cached)} cached + {len(owned)} owned slots"
        assert total == self.num_slots, f"{numbers} are not {self.num_slots}"
        distinct = {*free, *cached, *owned}
        assert len(distinct) == total, f"{numbers}, but only {len(distinct)} distinct ones"
        assert min(distinct) == 1, f"slot {min(distinct)} was handed out"
        assert max(distinct) == self.num_slots, f"slot {max(distinct)} of {self.num_slots}"


class PrefixCache(NullPrefixCache):
    """Slots with a memory: computed tokens stay in a radix tree until their slots are needed."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._tree = RadixTree()
        self._min_eviction = num_slots // EVICTION_SHARE

    @property
    def num_evictable(self) -> int:
        return self._tree.num_evictable_tokens

    def match_length(self, request: Request) -> int:
        return self._tree.match_length(request.token_ids, request.max_cached_tokens)

    def acquire(self, request: Request) -> None:
        node, slots = self._tree.match(request.token_ids, request.max_cached_tokens)
        self._tree.lock(node)
        request.tree_node = node
        request.slots = slots
        request.num_tree_tokens = request.num_unsent_slots = request.num_computed_tokens = len(slots)

    def share(self, request: Request) -> None:
        assert request.tree_node is not None, f"{request.request_id} was not acquired"
        start = request.num_tree_tokens
        stop = min(request.num_computed_tokens, len(request.token_ids))
        request.tree_node, duplicates = self._tree.insert(
            request.tree_node, request.token_ids, request.slots, start, stop
        )
        request.num_tree_tokens = stop
        if duplicates:
            # The step that writes these slots runs before any that gets them next.
            self._allocator.free(duplicates)
            request.num_unsent_slots = max(request.num_unsent_slots, len(request.slots) - start)

    def release(self, request: Request) -> None:
        self.share(request)
        assert request.tree_node is not None
        self._tree.unlock(request.tree_node)
        request.tree_node = None
        super().release(request)

    def check_integrity(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        self._check_slots(requests, self._tree.check_integrity())
        num_locks: dict[int, int] = {}
        for request in requests:
            token_ids, slots = array("i"), array("i")
            step: Node | None = request.tree_node
            while step is not None:
                num_locks[id(step)] = num_locks.get(id(step), 0) + 1
                token_ids, slots = step.token_ids + token_ids, step.slots + slots
                step = step.parent
            length = request.num_tree_tokens
            assert token_ids == request.token_ids[:length], f"{request.request_id}: locks another prefix"
            assert slots == request.slots[:length], f"{request.request_id}: uses other slots than the tree's"
        for node in self._tree.nodes():
            expected = num_locks.get(id(node), 0)
            assert node.num_locks == expected, f"node has {node.num_locks} locks, {expected} requests use it"

    def _make_room(self, count: int) -> None:
        missing = count - self._allocator.num_free
        if missing > 0:
            num_tokens = min(max(missing, self._min_eviction), self._tree.num_evictable_tokens)
            self._allocator.free(self._tree.evict(num_tokens))
