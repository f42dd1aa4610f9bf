"""SlotAllocator: every slot once, never the dummy, and long runs."""

import itertools
import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightllm.scheduler.slots import REGION_SIZE, SlotAllocator


def runs(slots):
    """Lengths of the contiguous runs of a slot list."""
    lengths = [1]
    for before, after in itertools.pairwise(slots):
        if after == before + 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths


@pytest.mark.parametrize("num_slots", [1, 2, 63, 64, 65, 1000])
def test_hands_out_every_slot_but_the_dummy(num_slots):
    allocator = SlotAllocator(num_slots)
    slots = allocator.alloc(num_slots)
    assert sorted(slots) == list(range(1, num_slots + 1))
    assert allocator.num_free == 0
    assert allocator.alloc(1) is None
    allocator.free(slots)
    assert list(allocator.free_slots()) == list(range(1, num_slots + 1))


def test_takes_nothing_when_there_is_too_little():
    allocator = SlotAllocator(10)
    assert allocator.alloc(11) is None
    assert allocator.num_free == 10


def test_a_prompt_is_one_run_in_a_fresh_pool():
    allocator = SlotAllocator(1000)
    assert len(runs(allocator.alloc(300))) == 1


def test_requests_that_grow_in_turn_do_not_interleave():
    allocator = SlotAllocator(20 * REGION_SIZE)
    requests = [list(allocator.alloc(10)) for _ in range(5)]
    for _ in range(100):
        for slots, slot in zip(requests, allocator.alloc_each([s[-1] for s in requests]), strict=True):
            slots.append(slot)
    for slots in requests:
        assert sum(runs(slots)) == 110
        assert len(runs(slots)) <= 2, runs(slots)


def test_grows_into_the_next_region_only_if_it_is_wholly_free():
    allocator = SlotAllocator(10 * REGION_SIZE)
    first = allocator.alloc(REGION_SIZE)
    assert allocator.alloc(1, first[-1])[0] == first[-1] + 1
    other = allocator.alloc(REGION_SIZE)
    stranger = allocator.alloc(1, other[-1])
    last = allocator.alloc(1, stranger[-1] - 2)
    assert last[0] != stranger[-1] + 1


def test_under_pressure_every_scattered_slot_is_found():
    allocator = SlotAllocator(300)
    slots = allocator.alloc(300)
    allocator.free(slots[::7])
    allocator.free(slots[3::7])
    scattered = sorted([*slots[::7], *slots[3::7]])
    assert sorted([*allocator.alloc(20), *allocator.alloc_each([5] * (len(scattered) - 20))]) == scattered


def test_frees_in_any_order_and_joins_regions_again():
    allocator = SlotAllocator(5 * REGION_SIZE)
    slots = allocator.alloc(5 * REGION_SIZE)
    backwards = array("i", reversed(slots))
    allocator.free(backwards[: 2 * REGION_SIZE])
    allocator.free(backwards[2 * REGION_SIZE :])
    assert len(runs(allocator.alloc(4 * REGION_SIZE))) == 1


def test_a_region_that_is_free_again_is_better_than_lower_scattered_slots():
    allocator = SlotAllocator(5 * REGION_SIZE)
    allocator.free(array("i", sorted(allocator.alloc(5 * REGION_SIZE)))[: 4 * REGION_SIZE : 3])
    third_region = array("i", range(3 * REGION_SIZE, 4 * REGION_SIZE))
    allocator.free(array("i", [slot for slot in third_region if slot not in allocator.free_slots()]))
    assert allocator.alloc(REGION_SIZE) == third_region


def test_a_slot_freed_twice_is_noticed():
    allocator = SlotAllocator(100)
    slots = allocator.alloc(10)
    allocator.free(slots)
    with pytest.raises(AssertionError, match="free one already"):
        allocator.free(slots[3:4])


@given(st.integers(1, 200), st.lists(st.tuples(st.sampled_from("age"), st.integers(0, 99)), max_size=60))
def test_agrees_with_a_set(num_slots, operations):
    allocator = SlotAllocator(num_slots)
    free, owners = set(range(1, num_slots + 1)), [array("i")]
    for operation, number in operations:
        owner = owners[number % len(owners)]
        if operation == "a":
            slots = allocator.alloc(number, owner[-1] if owner else -1)
            assert (slots is None) == (number > len(free))
            if slots:
                assert free.issuperset(slots)
                assert len(set(slots)) == number
                free.difference_update(slots)
                owners.append(slots)
        elif operation == "g" and len(free) >= len(owners):
            given_slots = allocator.alloc_each([o[-1] if o else -1 for o in owners])
            assert free.issuperset(given_slots)
            free.difference_update(given_slots)
            assert len(set(given_slots)) == len(owners)
            for grown, slot in zip(owners, given_slots, strict=True):
                grown.append(slot)
        elif operation == "e":
            count = number % (len(owner) + 1)
            allocator.free(owner[:count])
            free.update(owner[:count])
            del owner[:count]
        assert set(allocator.free_slots()) == free


def test_many_slots_at_once_are_those_of_region_after_region() -> None:
    rng = random.Random(7)
    for _ in range(50):
        at_once, stepwise = SlotAllocator(40 * REGION_SIZE), SlotAllocator(40 * REGION_SIZE)
        taken = at_once.alloc(at_once.num_slots)
        stepwise.alloc(stepwise.num_slots)
        for region in rng.sample(range(1, 39), 25):
            freed = taken[region * REGION_SIZE - 1 : (region + 1) * REGION_SIZE - 1 - rng.choice((0, 0, 5))]
            at_once.free(freed)
            stepwise.free(freed)
        count = rng.randrange(at_once.num_free + 1)
        slots = at_once.alloc(count)
        piecewise, last = array("i"), -1
        while len(piecewise) < count:
            room = REGION_SIZE - (last + 1) % REGION_SIZE
            piecewise += stepwise.alloc(min(room, count - len(piecewise)), last)
            last = piecewise[-1]
        assert slots == piecewise
        assert at_once.free_slots() == stepwise.free_slots()
