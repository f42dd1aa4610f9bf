"""Drafting: what is guessed, when it stops, and that a step with drafts brings the same tokens."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightllm.scheduler.drafting import FIRST_PAUSE, TAILS, Drafting, continuation
from tests.scheduler.fake_worker import ANY_LENGTH, Driver

TOKENS = st.lists(st.integers(0, 3), max_size=40)


def by_definition(tokens: list[int], count: int) -> list[int]:
    for length in TAILS:
        tail = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if len(tail) == length and tokens[start : start + length] == tail:
                longer = list(tokens)
                for i in range(count):
                    longer.append(longer[start + length + i])
                return longer[len(tokens) :]
    return []


@given(TOKENS, st.integers(1, 12))
def test_what_followed_the_tail_before(tokens: list[int], count: int) -> None:
    assert continuation(array("i", tokens), count) == by_definition(tokens, count)


def test_bytes_between_tokens_are_no_occurrence() -> None:
    # Read one byte further on, 0x01000000 repeated is 0x00010000...
    tokens = array("i", [0x01000000, 0x01000000, 0x01000000, 7, 0x010000, 0x010000])
    assert continuation(tokens, 3) == by_definition(tokens.tolist(), 3) == []


def settle(drafting: Drafting, num_accepted: int, num_tokens: int, cost: float = 0.3) -> int:
    """One step in which each drafted position costs `cost` of a step; returns how many there were."""
    drafts = drafting.propose(array("i", [i % 2 for i in range(num_tokens)]), 100)
    drafting.num_in_flight = len(drafts)
    if drafts:
        drafting.settle(min(num_accepted, len(drafts)), num_tokens, 0.01 * (1 + cost * len(drafts)), 0.01)
    return len(drafts)


def test_drafts_get_longer_while_they_are_right() -> None:
    drafting = Drafting(12)
    assert [settle(drafting, 100, 50) for _ in range(4)] == [2, 4, 8, 12]
    assert settle(drafting, 3, 50) == 12
    assert settle(drafting, 0, 50) == 3
    assert settle(drafting, 1, 50) == 1


def test_drafting_that_does_not_pay_pauses_for_longer_and_longer() -> None:
    drafting = Drafting(4)
    pauses, position = [], 50
    while len(pauses) < 3:
        drafted = settle(drafting, 0, position)
        start = position
        while not drafted:
            position += 1
            drafted = settle(drafting, 0, position)
        if position - start > 1:
            pauses.append(position - start)
        position += 1
    assert pauses == [FIRST_PAUSE - 1, 2 * FIRST_PAUSE - 1, 4 * FIRST_PAUSE - 1]


def test_drafting_that_pays_goes_on_though_some_drafts_are_wrong() -> None:
    drafting = Drafting(4)
    for i in range(200):
        assert settle(drafting, 4 if i % 3 else 0, 50)


def run(draft_ngram: int, prompt: list[int], *, max_lag: int = 1, **fields) -> Driver:
    driver = Driver(max_lag=max_lag, draft_ngram=draft_ngram)
    driver.add(prompt, max_new_tokens=200, **fields)
    driver.drain()
    return driver


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_a_single_stream_takes_fewer_steps_for_the_same_tokens(max_lag: int) -> None:
    plain = run(0, [0, 1] * 10, max_lag=max_lag, logprobs=0, **ANY_LENGTH)
    drafted = run(8, [0, 1] * 10, max_lag=max_lag, logprobs=0, **ANY_LENGTH)
    assert drafted.token_ids("r0") == plain.token_ids("r0")
    assert any(batch.drafts for batch in drafted.batches)
    assert len(drafted.batches) < len(plain.batches)
    stats = drafted.scheduler.stats()
    assert stats.generated_tokens_total == 200


def test_two_streams_do_not_draft() -> None:
    driver = Driver(draft_ngram=8)
    for _ in range(2):
        driver.add([0, 1] * 10, max_new_tokens=50, **ANY_LENGTH)
    driver.drain()
    assert not any(batch.drafts for batch in driver.batches)


def test_a_stream_that_becomes_the_only_one_drafts_and_stops_when_another_comes() -> None:
    driver = Driver(draft_ngram=8)
    driver.add([0, 1] * 10, max_new_tokens=200, **ANY_LENGTH)
    while not any(batch.drafts for batch in driver.batches):
        driver.step()
    seen = len(driver.batches)
    driver.add([2], max_new_tokens=20, **ANY_LENGTH)
    while not driver.outputs["r1"] or driver.last("r1").finish_reason is None:
        driver.step()
    assert not any(batch.drafts for batch in driver.batches[seen : seen + 20])
    driver.drain()
    assert any(batch.drafts for batch in driver.batches[seen:])


def test_an_aborted_draft_gives_its_slots_back() -> None:
    driver = Driver(draft_ngram=8)
    driver.add([0, 1] * 10, max_new_tokens=200, **ANY_LENGTH)
    while not driver.batches or not driver.batches[-1].drafts:
        driver.step()
    driver.abort("r0")
    driver.drain()
    assert driver.last("r0").finish_reason == "abort"


@given(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 3))
def test_the_end_may_stand_among_the_accepted_drafts(prompt: list[int], draft_ngram: int, lag: int) -> None:
    """Tokens, logprobs and the reason of the end are as without drafts: drain checks them."""
    for min_new_tokens in (0, 7):
        run(draft_ngram, prompt * 3, max_lag=lag, logprobs=0, min_new_tokens=min_new_tokens)
