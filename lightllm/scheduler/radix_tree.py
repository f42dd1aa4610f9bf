"""RadixTree: which token sequences have their KV in which slots.

Each node holds a run of token ids and the slot of each; the path from the root spells a prefix. Nodes are
split where sequences part, at any token. A lock on a node keeps its whole path; what is not locked may be
evicted, least recently used leaves first, from their ends, so that never more is lost than was asked for.
Token ids and slots are `array("i")`, because slices of arrays are copied and compared at memory speed.
Knows nothing of requests, and does not own a free list: evicted slots are handed back to the caller.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator


class Node:
    """A run of tokens below `parent`. A node keeps its identity as the end of its run when it is split."""

    __slots__ = ("children", "is_offered", "last_used", "num_locks", "parent", "slots", "token_ids")

    def __init__(self, parent: Node | None, token_ids: array[int], slots: array[int]) -> None:
        self.parent = parent
        self.token_ids = token_ids
        self.slots = slots
        self.children: dict[int, Node] = {}
        self.num_locks = 0
        self.last_used = 0
        self.is_offered = False


class RadixTree:
    """Map prefixes of token ids to slots.

    `num_tokens` counts all tokens held, `num_evictable_tokens` those on no locked path.
    """

    def __init__(self) -> None:
        self.root = Node(None, array("i"), array("i"))
        self.num_tokens = 0
        self.num_evictable_tokens = 0
        self._clock = 0
        # (last_used, tie-breaker, node): all unlocked leaves, and nodes that were such; one entry per node at
        # most, judged when it comes up.
        self._offers: list[tuple[int, int, Node]] = []
        self._num_offers = 0

    def match(self, token_ids: array[int], limit: int) -> tuple[Node, array[int]]:
        """Find the longest stored prefix of `token_ids[:limit]`.

        Returns:
            The node that ends exactly with the prefix (split off if need be) and the prefix's slots.
        """
        node, length = self.root, 0
        slots = array("i")
        while length < limit:
            child = node.children.get(token_ids[length])
            if child is None:
                break
            stop = length + len(child.token_ids)
            if stop > limit or child.token_ids != token_ids[length:stop]:
                size = _common_size(child.token_ids, token_ids, length, limit)
                child = self._split(child, size)
                stop = length + size
            slots.extend(child.slots)
            node, length = child, stop
        return node, slots

    def match_length(self, token_ids: array[int], limit: int) -> int:
        """Length of the longest stored prefix of `token_ids[:limit]`; changes nothing."""
        node, length = self.root, 0
        while length < limit:
            child = node.children.get(token_ids[length])
            if child is None:
                break
            size = _common_size(child.token_ids, token_ids, length, limit)
            length += size
            if size < len(child.token_ids):
                break
            node = child
        return length

    def insert(
        self, node: Node, token_ids: array[int], slots: array[int], start: int, stop: int
    ) -> tuple[Node, array[int]]:
        """Store positions [start, stop) of a sequence whose first `start` tokens end with `node`.

        Where the tree has a position already, its own slot stays and `slots` is changed to it in place.
        `node` must be locked by the caller; the lock is moved on to the node returned.

        Returns:
            The node that ends at `stop`, and the slots that were replaced: those from `start` on, if any.
        """
        locked, duplicates = node, array("i")
        while start < stop:
            child = node.children.get(token_ids[start])
            if child is None:
                node = self._append(node, token_ids[start:stop], slots[start:stop], is_own=node is locked)
                break
            size = _common_size(child.token_ids, token_ids, start, stop)
            node = child if size == len(child.token_ids) else self._split(child, size)
            duplicates.extend(slots[start : start + size])
            slots[start : start + size] = node.slots
            start += size
        self.lock(node, above=locked)
        return node, duplicates

    def lock(self, node: Node, above: Node | None = None) -> None:
        """Keep `node` and its path up to, not including, `above` (None: the whole path)."""
        step: Node | None = node
        while step is not above and step is not None:
            if not step.num_locks:
                self.num_evictable_tokens -= len(step.token_ids)
            step.num_locks += 1
            step = step.parent

    def unlock(self, node: Node) -> None:
        """Take back one lock of `node`; what nobody else locks counts as used just now."""
        self._clock += 1
        step: Node | None = node
        while step is not None:
            step.num_locks -= 1
            if not step.num_locks:
                self.num_evictable_tokens += len(step.token_ids)
                step.last_used = self._clock
                if not step.children:
                    self._offer(step)
            step = step.parent

    def evict(self, num_tokens: int) -> array[int]:
        """Forget the `num_tokens` least recently used tokens; there must be as many evictable ones.

        Returns:
            Their slots.
        """
        available = self.num_evictable_tokens
        assert num_tokens <= available, f"{num_tokens} tokens to evict, {available} are evictable"
        slots = array("i")
        while len(slots) < num_tokens:
            last_used, _, node = heapq.heappop(self._offers)
            node.is_offered = False
            if node.children or node.num_locks:
                continue  # offered again when its last child or lock goes
            if last_used != node.last_used:
                self._offer(node)
                continue
            self._trim(node, num_tokens - len(slots), slots)
        self.num_tokens -= num_tokens
        self.num_evictable_tokens -= num_tokens
        return slots

    def _trim(self, leaf: Node, num_tokens: int, slots: array[int]) -> None:
        """Move up to `num_tokens` slots from the end of `leaf` to `slots`; drop the leaf once it is empty."""
        first_token_id = leaf.token_ids[0]
        slots.extend(leaf.slots[-num_tokens:])
        del leaf.slots[-num_tokens:], leaf.token_ids[-num_tokens:]
        parent = leaf.parent
        if leaf.token_ids:
            self._offer(leaf)
        elif parent is not None:
            del parent.children[first_token_id]
            if not parent.children and not parent.num_locks:
                self._offer(parent)

    def _offer(self, leaf: Node) -> None:
        if leaf is self.root or leaf.is_offered:
            return
        self._num_offers += 1
        leaf.is_offered = True
        heapq.heappush(self._offers, (leaf.last_used, self._num_offers, leaf))

    def _append(self, node: Node, token_ids: array[int], slots: array[int], is_own: bool) -> Node:
        """Put tokens behind `node`: into it if only the caller uses it (no chain of chunks), else below."""
        self.num_tokens += len(token_ids)
        if is_own and node.num_locks == 1 and not node.children and node is not self.root:
            node.token_ids.extend(token_ids)
            node.slots.extend(slots)
            return node
        self.num_evictable_tokens += len(token_ids)  # until the caller's lock reaches it
        child = node.children[token_ids[0]] = Node(node, token_ids, slots)
        return child

    def _split(self, node: Node, size: int) -> Node:
        """Put the first `size` tokens of `node` into a new node above it, and return that."""
        parent = node.parent
        assert parent is not None
        upper = Node(parent, node.token_ids[:size], node.slots[:size])
        upper.num_locks, upper.last_used = node.num_locks, node.last_used
        del node.token_ids[:size], node.slots[:size]
        parent.children[upper.token_ids[0]] = upper
        upper.children[node.token_ids[0]] = node
        node.parent = upper
        return upper

    def nodes(self) -> Iterator[Node]:
        """All nodes, each before its children."""
        pending = [self.root]
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            yield node

    def check_integrity(self) -> array[int]:
        """Check order, links, counters and offers of the whole tree; return all its slots."""
        num_tokens, num_evictable, slots = 0, 0, array("i")
        offered = {id(node) for _, _, node in self._offers}
        assert len(offered) == len(self._offers), f"{len(self._offers)} offers name {len(offered)} nodes"
        for node in self.nodes():
            size = len(node.token_ids)
            assert size == len(node.slots), f"node with {size} tokens has {len(node.slots)} slots"
            assert size or node is self.root, "empty node below the root"
            assert node.is_offered == (id(node) in offered), "offer mark and heap differ"
            num_tokens += size
            slots.extend(node.slots)
            if not node.num_locks:
                num_evictable += size
                assert node.children or node.is_offered or node is self.root, "unlocked leaf is not offered"
            for first_token_id, child in node.children.items():
                assert child.parent is node, "child is linked to another parent"
                assert child.token_ids[0] == first_token_id, f"child under {first_token_id} has another token"
                assert child.num_locks <= node.num_locks, f"{child.num_locks} locks below {node.num_locks}"
        assert num_tokens == self.num_tokens, f"{num_tokens} tokens in nodes, counter says {self.num_tokens}"
        counter = self.num_evictable_tokens
        assert num_evictable == counter, f"{num_evictable} tokens are unlocked, counter says {counter}"
        return slots


def _common_size(run: array[int], token_ids: array[int], start: int, limit: int) -> int:
    """How many tokens `run` and `token_ids[start:limit]` have in common at their beginning.

    A few comparisons of slices, first of everything, then by bisection; no loop over tokens.
    """
    size = min(len(run), limit - start)
    if run[:size] == token_ids[start : start + size]:
        return size
    low, high = 0, size  # the first `low` tokens agree, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if run[low:middle] == token_ids[start + low : start + middle]:
            low = middle
        else:
            high = middle
    return low
