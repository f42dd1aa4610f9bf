"""RadixTree against a dict of prefixes; locks, order of eviction, sharing."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightllm.scheduler.radix_tree import RadixTree


class Store:
    """A tree and its model: the slot of every stored prefix."""

    def __init__(self):
        self.tree = RadixTree()
        self.model: dict[tuple[int, ...], int] = {}
        self.num_slots = 0

    def insert(self, token_ids, *, keep_lock=False):
        """Insert a sequence with slots of its own; returns the node, and the slots as the tree has them."""
        slots = array("i", range(self.num_slots + 1, self.num_slots + len(token_ids) + 1))
        self.num_slots += len(token_ids)
        own = list(slots)
        self.tree.lock(self.tree.root)
        node, replaced = self.tree.insert(self.tree.root, array("i", token_ids), slots, 0, len(token_ids))
        assert own[: len(replaced)] == list(replaced)
        for i in range(len(token_ids)):
            known = self.model.setdefault(tuple(token_ids[: i + 1]), own[i])
            assert slots[i] == known
            assert (i < len(replaced)) == (known != own[i])
        if not keep_lock:
            self.tree.unlock(node)
        return node, slots

    def length(self, token_ids):
        return next(
            (i for i in range(len(token_ids)) if tuple(token_ids[: i + 1]) not in self.model), len(token_ids)
        )

    def evict(self, num_tokens):
        evicted = set(self.tree.evict(num_tokens))
        assert len(evicted) == num_tokens
        assert evicted <= set(self.model.values())
        self.model = {prefix: slot for prefix, slot in self.model.items() if slot not in evicted}
        for prefix in self.model:
            assert len(prefix) == 1 or prefix[:-1] in self.model, "an inner token was evicted before its leaf"

    def check(self):
        assert sorted(self.tree.check_integrity()) == sorted(self.model.values())
        assert self.tree.num_tokens == len(self.model)


sequences = st.lists(st.integers(0, 2), min_size=1, max_size=12)
operations = st.lists(
    st.tuples(st.sampled_from(["insert", "lock", "unlock", "match", "evict"]), sequences), max_size=40
)


@given(operations)
def test_agrees_with_a_dict_of_prefixes(operations):
    store, locks = Store(), []
    for operation, token_ids in operations:
        if operation == "insert":
            store.insert(token_ids)
        elif operation == "lock":
            locks.append((token_ids, *store.insert(token_ids, keep_lock=True)))
        elif operation == "unlock" and locks:
            store.tree.unlock(locks.pop(len(token_ids) % len(locks))[1])
        elif operation == "match":
            limit = max(0, len(token_ids) - 1)
            expected = store.length(token_ids[:limit])
            assert store.tree.match_length(array("i", token_ids), limit) == expected
            node, slots = store.tree.match(array("i", token_ids), limit)
            assert list(slots) == [store.model[tuple(token_ids[: i + 1])] for i in range(expected)]
            assert expected == 0 or node.slots[-1] == slots[-1]
        elif operation == "evict":
            store.evict(min(len(token_ids), store.tree.num_evictable_tokens))
        store.check()
        for locked, _, slots in locks:
            assert [store.model[tuple(locked[: i + 1])] for i in range(len(locked))] == list(slots)
    for _, node, _ in locks:
        store.tree.unlock(node)
    assert store.tree.num_evictable_tokens == store.tree.num_tokens
    store.evict(store.tree.num_tokens)
    store.check()


def test_the_least_recently_used_leaf_goes_first_and_from_its_end():
    store = Store()
    for token_ids in ([1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]):
        store.insert(token_ids)
    node, _ = store.tree.match(array("i", [1, 1, 1, 1]), 4)
    store.tree.lock(node)
    store.tree.unlock(node)
    store.evict(6)
    lengths = [store.length([i] * 4) for i in (1, 2, 3)]
    assert lengths == [4, 0, 2]
    store.evict(3)
    assert store.length([1] * 4) == 3


def test_a_shared_beginning_outlives_its_branches():
    store = Store()
    store.insert([1, 2, 3])
    store.insert([1, 2, 4])
    store.evict(2)
    assert store.length([1, 2]) == 2
    store.evict(2)
    assert store.tree.num_tokens == 0


def test_nothing_locked_is_evicted():
    store = Store()
    store.insert([1, 2, 3], keep_lock=True)
    store.insert([1, 2, 3, 4, 5])
    assert store.tree.num_evictable_tokens == 2
    with pytest.raises(AssertionError, match="3 tokens to evict, 2 are evictable"):
        store.tree.evict(3)
    store.evict(2)
    assert store.length([1, 2, 3]) == 3


def test_chunks_of_one_request_make_one_node():
    tree = RadixTree()
    token_ids, slots = array("i", range(1000)), array("i", range(1, 1001))
    tree.lock(tree.root)
    node = tree.root
    for start in range(0, 1000, 100):
        node, replaced = tree.insert(node, token_ids, slots, start, start + 100)
        assert not replaced
    assert len(list(tree.nodes())) == 2
    tree.unlock(node)
    assert list(tree.check_integrity()) == list(slots)


def test_a_split_keeps_the_ends_that_others_hold():
    store = Store()
    longer, _ = store.insert([1, 2, 3, 4], keep_lock=True)
    shorter, slots = store.tree.match(array("i", [1, 2, 9]), 3)
    assert list(slots) == [1, 2]
    assert list(longer.token_ids) == [3, 4]
    assert longer.parent is shorter
    store.check()
