"""Scheduler: resumed requests, seeds, statistics and its integrity check."""

import pytest

from tests.scheduler.fake_worker import ANY_LENGTH, EOS, Driver


def test_a_request_from_a_failed_node_goes_on_behind_its_tokens():
    prompt = [1, 2, 3]
    driver = Driver()
    whole = driver.add(prompt, max_new_tokens=10, **ANY_LENGTH)
    driver.drain()
    made = driver.token_ids(whole)
    resumed = driver.add(prompt, max_new_tokens=10, output_token_ids=made[:6], **ANY_LENGTH)
    driver.drain()
    assert driver.token_ids(resumed) == made[6:]
    assert driver.last(resumed).num_cached_tokens == 3
    assert driver.batches[-4].new_requests[0].num_prompt_tokens == 3


def test_a_resumed_request_that_is_complete_ends_at_once():
    driver = Driver()
    name = driver.add([1], max_new_tokens=2, output_token_ids=[3, 4], **ANY_LENGTH)
    assert driver.last(name).finish_reason == "length"
    name = driver.add([1], max_new_tokens=5, output_token_ids=[3, EOS])
    assert driver.last(name).finish_reason == "stop"
    assert not driver.scheduler.has_work


def test_seeds_are_kept_or_drawn():
    driver = Driver()
    for seed in (7, 7, None, None):
        driver.add([1], max_new_tokens=1, seed=seed, sample_index=3)
    driver.drain()
    news = [new for batch in driver.batches for new in batch.new_requests]
    assert [new.seed for new in news[:2]] == [7, 7]
    assert news[2].seed != news[3].seed
    assert {new.sample_index for new in news} == {3}
    assert {tuple(new.eos_token_ids) for new in news} == {(EOS,)}


def test_stats_say_what_is_used_cached_and_committed():
    driver = Driver(num_slots=100, max_running=1, max_lag=0)
    assert driver.scheduler.stats().step_phase == "idle"
    driver.add([1] * 20, max_new_tokens=3, **ANY_LENGTH)
    driver.add([2] * 10, max_new_tokens=5, **ANY_LENGTH)
    driver.step()
    stats = driver.scheduler.stats()
    assert (stats.requests_running, stats.requests_waiting) == (1, 1)
    assert (stats.kv_used_tokens, stats.kv_committed_tokens, stats.kv_total_tokens) == (20, 23, 100)
    assert (stats.step_phase, stats.step_batch_size, stats.step_num_tokens) == ("prefill", 1, 20)
    driver.step()
    stats = driver.scheduler.stats()
    assert (stats.step_phase, stats.step_num_tokens, stats.step_duration_s) == ("decode", 1, 0.01)
    driver.drain()
    stats = driver.scheduler.stats()
    assert (stats.generated_tokens_total, stats.prompt_tokens_total, stats.kv_cached_tokens) == (8, 30, 36)
    assert stats.steps_total == len(driver.batches)


def test_has_work_until_the_last_result_is_taken():
    driver = Driver(max_lag=1)
    name = driver.add([1], max_new_tokens=5, **ANY_LENGTH)
    driver.step()
    assert list(driver.scheduler.requests) == [name]
    driver.abort(name)
    assert driver.scheduler.has_work
    driver.drain()
    assert not driver.scheduler.has_work


@pytest.mark.parametrize("damage", ["slot", "row", "lock", "committed"])
def test_check_integrity_finds_damage(damage):
    driver = Driver(max_lag=0)
    name = driver.add([1] * 10, max_new_tokens=9, **ANY_LENGTH)
    driver.step()
    driver.step()
    scheduler, request = driver.scheduler, driver.scheduler._requests[name]
    if damage == "slot":
        request.slots[-1] = request.slots[0]
    elif damage == "row":
        request.row += 1
    elif damage == "lock":
        request.tree_node.num_locks += 1
    else:
        scheduler._rows.num_committed_tokens += 1
    with pytest.raises(AssertionError, match=r"\d"):
        scheduler.check_integrity()


def test_the_time_in_the_queue_is_told_with_the_tokens():
    driver = Driver(max_running=1)
    first = driver.add([1, 2], max_new_tokens=2, **ANY_LENGTH)
    second = driver.add([3, 4], max_new_tokens=2, **ANY_LENGTH)
    arrived_s = driver.now_s
    driver.drain()
    assert driver.outputs[first][0].queue_s == pytest.approx(0.01)
    waits = {output.queue_s for output in driver.outputs[second]}
    assert len(waits) == 1
    assert 0.02 < waits.pop() <= driver.now_s - arrived_s
