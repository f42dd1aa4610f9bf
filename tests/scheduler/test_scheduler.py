"""What the scheduler promises, one promise a test."""

import itertools

import pytest

from lightllm.errors import ERROR_CODES, ConfigError
from lightllm.messages import FINISH_REASONS, Grammar
from lightllm.sampling_params import SamplingParams
from tests.scheduler.fake_worker import ANY_LENGTH, EOS, Driver, expected_output


def rows_of(batch):
    """(row, start, count, is_sampling) of each request in a batch."""
    return list(zip(batch.rows, batch.starts, batch.num_new_tokens, batch.is_sampling, strict=True))


# ------------------------------------------------------------ accepting and refusing


def refusal(driver, prompt, **fields):
    output = driver.last(driver.add(prompt, **fields))
    assert output.finish_reason == "error"
    assert output.error.code in ERROR_CODES
    return output.error


def test_refuses_what_can_never_fit():
    driver = Driver(num_slots=100, max_req_total_len=50)
    error = refusal(driver, [1] * 40, max_new_tokens=11)
    assert error.code == "context_length_exceeded"
    assert "40" in error.message
    assert "11" in error.message
    assert "50" in error.message
    driver.add([1] * 40, max_new_tokens=10)
    driver.drain()


def test_the_pool_limits_a_request_too():
    driver = Driver(num_slots=30, max_req_total_len=50)
    assert refusal(driver, [1] * 25, max_new_tokens=6).code == "context_length_exceeded"
    name = driver.add([1] * 25, max_new_tokens=5, **ANY_LENGTH)
    driver.drain()
    assert len(driver.token_ids(name)) == 5


def test_refuses_when_the_queue_is_full_beyond_the_free_rows():
    driver = Driver(max_running=2, max_queued_requests=1)
    accepted = [driver.add([1, 2]) for _ in range(3)]
    assert refusal(driver, [1, 2]).code == "queue_full"
    driver.step()
    assert refusal(driver, [1, 2]).code == "queue_full"
    driver.drain()
    assert [driver.last(name).finish_reason in ("stop", "length") for name in accepted] == [True] * 3
    driver.add([1, 2])
    driver.drain()


def test_refuses_a_known_id_and_keeps_the_first():
    driver = Driver()
    name = driver.add([1, 2], max_new_tokens=3, **ANY_LENGTH)
    output = driver.scheduler.add(driver.requests[name], driver.now_s)
    assert output.error.code == "internal"
    driver.drain()
    assert len(driver.token_ids(name)) == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": Grammar(kind="regex", text="a*")},
        {"grammar": Grammar(kind="json_schema", text="{}")},
    ],
)
def test_refuses_what_is_not_built(fields):
    assert refusal(Driver(), [1], **fields).code == "not_supported"


def test_refuses_an_empty_prompt():
    assert refusal(Driver(), []).code == "out_of_range"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_running": 0}, "max_running"),
        ({"schedule_policy": "lottery"}, "fcfs, shortest_prefill"),
        ({"enable_chunked_prefill": False, "batch_max_tokens": 100}, "--batch_max_tokens 100"),
    ],
)
def test_refuses_a_configuration_that_could_wait_for_ever(fields, text):
    with pytest.raises(ConfigError, match=text):
        Driver(**fields)


# ------------------------------------------------------------ steps


def test_a_step_has_decodes_then_running_prefills_then_new_requests_within_its_budget():
    driver = Driver(batch_max_tokens=20, chunked_prefill_size=16, max_lag=0)
    driver.add([1], max_new_tokens=9, **ANY_LENGTH)
    driver.step()
    driver.add([2] * 40, max_new_tokens=1)
    driver.add([3] * 30, max_new_tokens=1)
    for _ in range(3):
        driver.step()
    assert [rows_of(batch) for batch in driver.batches[1:]] == [
        [(0, 1, 1, True), (1, 0, 16, False), (2, 0, 3, False)],
        [(0, 2, 1, True), (1, 16, 16, False), (2, 3, 3, False)],
        [(0, 3, 1, True), (1, 32, 8, True), (2, 6, 11, False)],
    ]
    driver.drain()


def test_without_chunks_a_prompt_waits_for_a_step_that_takes_it_whole():
    driver = Driver(batch_max_tokens=50, max_req_total_len=50, enable_chunked_prefill=False, max_lag=0)
    driver.add([1] * 30, max_new_tokens=2, **ANY_LENGTH)
    late = driver.add([2] * 30, max_new_tokens=2)
    driver.step()
    assert [batch.num_new_tokens for batch in driver.batches] == [[30]]
    driver.step()
    assert driver.batches[1].num_new_tokens == [1, 30]
    driver.drain()
    assert driver.token_ids(late)


def test_the_next_decode_is_scheduled_before_the_last_token_is_known():
    driver = Driver(max_lag=1)
    name = driver.add([1, 2, 3], max_new_tokens=3, **ANY_LENGTH)
    driver.step()
    assert driver.token_ids(name) == []
    driver.step()
    assert rows_of(driver.batches[1]) == [(0, 3, 1, True)]
    assert len(driver.token_ids(name)) == 1
    driver.drain()
    assert len(driver.batches) == 3


def stopping_prompt(num_tokens):
    """A prompt whose output is ended by an end token as the `num_tokens`-th."""
    params = SamplingParams(max_new_tokens=50)
    for prompt in itertools.product(range(10), repeat=4):
        output, reason = expected_output(prompt, params)
        if reason == "stop" and len(output) == num_tokens:
            return list(prompt)
    raise AssertionError("the fake model never says so")


def test_a_stop_is_seen_one_step_late_and_the_token_beside_it_is_dropped():
    driver = Driver(max_lag=1)
    prompt = stopping_prompt(3)
    name = driver.add(prompt, max_new_tokens=50)
    driver.drain()
    assert len(driver.batches) == 4
    assert driver.token_ids(name)[-1] == EOS
    assert driver.last(name).finish_reason == "stop"
    assert driver.scheduler.stats().generated_tokens_total == 3


def test_min_new_tokens_is_the_earliest_place_of_an_end_token():
    prompt = stopping_prompt(3)
    for earliest, is_ended in ((0, True), (3, True), (4, False)):
        driver = Driver()
        name = driver.add(prompt, max_new_tokens=50, min_new_tokens=earliest)
        driver.drain()
        assert (len(driver.token_ids(name)) == 3) == is_ended


def test_ignore_eos_and_stop_token_ids():
    prompt = stopping_prompt(3)
    driver = Driver()
    first, second, _ = expected_output(prompt, SamplingParams(max_new_tokens=50))[0]
    ignoring = driver.add(prompt, max_new_tokens=10, ignore_eos=True)
    stopping = driver.add(prompt, max_new_tokens=10, stop_token_ids=[second])
    driver.drain()
    assert len(driver.token_ids(ignoring)) == 10
    assert driver.token_ids(stopping) == ([first, second] if first != second else [first])


def test_rows_are_reused_at_once_and_freed_ones_announced_once():
    driver = Driver(max_running=2, max_lag=0)
    for length in (1, 3):
        driver.add([length], max_new_tokens=length, **ANY_LENGTH)
    driver.step()
    driver.step()
    assert driver.batches[1].freed_rows == [0]
    driver.add([7], max_new_tokens=9, **ANY_LENGTH)
    driver.step()
    assert [new.row for new in driver.batches[2].new_requests] == [0]
    assert driver.batches[2].freed_rows == []
    driver.step()
    assert driver.batches[3].freed_rows == [1]
    driver.drain()


# ------------------------------------------------------------ ends


def test_abort_frees_everything_at_once_and_drops_what_is_in_flight():
    driver = Driver(max_lag=1, enable_prefix_cache=False)
    name = driver.add([1] * 20, max_new_tokens=20, **ANY_LENGTH)
    driver.step()
    driver.step()
    driver.abort(name, "stop")
    assert driver.scheduler.stats().kv_used_tokens == 0
    assert driver.last(name).finish_reason == "stop"
    driver.abort(name)
    again = driver.add([1] * 20, name, max_new_tokens=2, **ANY_LENGTH)
    driver.drain()
    assert len(driver.token_ids(again)) == 2


def test_abort_of_a_waiting_and_of_an_unknown_request():
    driver = Driver(max_running=1)
    driver.add([1], max_new_tokens=5, **ANY_LENGTH)
    waiting = driver.add([2])
    driver.step()
    driver.abort(waiting)
    assert driver.last(waiting).finish_reason == "abort"
    assert driver.scheduler.abort("nobody", "abort") is None
    driver.drain()


def test_deadlines_end_running_and_waiting_requests():
    driver = Driver(max_running=1)
    running = driver.add([1], max_new_tokens=50, deadline_s=driver.now_s + 0.055, **ANY_LENGTH)
    waiting = driver.add([2], deadline_s=driver.now_s + 0.055)
    other = driver.add([3], deadline_s=driver.now_s + 60)
    driver.drain()
    for name in (running, waiting):
        assert driver.last(name).error.code == "deadline"
    assert 0 < len(driver.token_ids(running)) < 50
    assert "0 of at most 16 tokens" in driver.last(waiting).error.message
    assert driver.last(other).error is None


def test_a_request_past_its_deadline_is_not_admitted_any_more():
    driver = Driver()
    name = driver.add([1], deadline_s=driver.now_s)
    assert driver.scheduler.schedule(driver.now_s) is None
    driver.drain()
    assert driver.last(name).error.code == "deadline"


def test_every_end_is_one_of_the_four():
    driver = Driver()
    names = [driver.add([1]), driver.add([1], deadline_s=driver.now_s), driver.add([])]
    driver.drain()
    assert {driver.last(name).finish_reason for name in names} <= set(FINISH_REASONS)


# ------------------------------------------------------------ prefix cache


def test_a_known_prefix_is_not_computed_again():
    driver = Driver(chunked_prefill_size=200, batch_max_tokens=200)
    prompt = [i % 3 for i in range(100)]
    driver.add(prompt, max_new_tokens=1)
    driver.drain()
    name = driver.add([*prompt, 1, 2], max_new_tokens=1)
    driver.drain()
    assert rows_of(driver.batches[-1]) == [(0, 100, 2, True)]
    assert driver.last(name).num_cached_tokens == 100
    stats = driver.scheduler.stats()
    assert (stats.prompt_tokens_total, stats.cached_tokens_total) == (202, 100)


def test_a_fully_known_prompt_still_computes_one_token():
    driver = Driver()
    for _ in range(2):
        name = driver.add([1] * 20, max_new_tokens=1)
        driver.drain()
    assert rows_of(driver.batches[-1]) == [(0, 19, 1, True)]
    assert driver.last(name).num_cached_tokens == 19


def test_outputs_are_cached_for_the_next_turn():
    driver = Driver()
    name = driver.add([1] * 10, max_new_tokens=10, **ANY_LENGTH)
    driver.drain()
    follow_up = driver.add([1] * 10 + driver.token_ids(name) + [2], max_new_tokens=1)
    driver.drain()
    assert driver.last(follow_up).num_cached_tokens >= 19


def test_without_the_cache_nothing_is_shared():
    driver = Driver(enable_prefix_cache=False)
    for _ in range(2):
        name = driver.add([1] * 20, max_new_tokens=1)
        driver.drain()
    assert driver.last(name).num_cached_tokens == 0
    assert driver.scheduler.stats().kv_cached_tokens == 0


def test_siblings_wait_for_the_prompt_and_share_it():
    driver = Driver(chunked_prefill_size=16, batch_max_tokens=64)
    leader = driver.add([1] * 30, max_new_tokens=4, **ANY_LENGTH)
    siblings = [
        driver.add([1] * 30, max_new_tokens=4, after_request_id=leader, **ANY_LENGTH) for _ in range(3)
    ]
    for _ in range(3):
        driver.step()
    assert [len(batch.new_requests) for batch in driver.batches] == [1, 0, 3]
    assert driver.batches[2].num_new_tokens == [1, 1, 1, 1]
    driver.drain()
    assert [driver.last(name).num_cached_tokens for name in siblings] == [29] * 3


def test_siblings_do_not_wait_for_one_that_is_gone():
    driver = Driver(max_running=1)
    driver.add([2], max_new_tokens=3, **ANY_LENGTH)
    leader = driver.add([1] * 30)
    sibling = driver.add([1] * 30, after_request_id=leader)
    driver.step()
    driver.abort(leader)
    late = driver.add([1] * 30, after_request_id=leader)
    driver.drain()
    assert driver.token_ids(sibling) == driver.token_ids(late) != []


def test_identical_prompts_computed_at_once_end_up_in_the_same_slots():
    driver = Driver(batch_max_tokens=100, chunked_prefill_size=50, max_lag=0)
    for _ in range(2):
        driver.add([1] * 40, max_new_tokens=20, **ANY_LENGTH)
    driver.step()
    assert driver.batches[0].num_new_tokens == [40, 40]
    assert driver.scheduler.stats().kv_used_tokens == 40
    driver.step()
    assert driver.batches[1].slot_starts == [40, 0]
    assert driver.batches[1].slots[1:41] == driver.batches[0].slots[:40]
    driver.drain()


def test_prompt_logprobs_compute_every_position():
    driver = Driver(chunked_prefill_size=8)
    driver.add([1] * 20, max_new_tokens=1)
    driver.drain()
    name = driver.add([1] * 20, max_new_tokens=2, prompt_logprobs=0, **ANY_LENGTH)
    driver.drain()
    assert driver.last(name).num_cached_tokens == 0
    assert len(driver.outputs[name][0].prompt_logprobs) == 20


# ------------------------------------------------------------ a full pool


def test_a_full_pool_preempts_the_lowest_priority_then_the_newest():
    for priorities, victim in (((0, 0, 0), 2), ((1, -1, 0), 1)):
        driver = Driver(num_slots=30, max_req_total_len=30)
        names = [
            driver.add([i] * 5, max_new_tokens=15, priority=priority, **ANY_LENGTH)
            for i, priority in enumerate(priorities)
        ]
        row_of = {}
        while not driver.scheduler.stats().preemptions_total:
            driver.step()
            row_of.update({new.request_id: new.row for new in driver.batches[-1].new_requests})
        assert driver.batches[-1].freed_rows == [row_of[names[victim]]]
        driver.drain()
        assert [len(driver.token_ids(name)) for name in names] == [15] * 3


def test_a_preempted_request_goes_on_where_it_was_with_the_same_seed():
    driver = Driver(num_slots=30, max_req_total_len=30)
    names = [driver.add([i] * 8, max_new_tokens=15, **ANY_LENGTH) for i in range(2)]
    driver.drain()
    assert driver.scheduler.stats().preemptions_total > 0
    entries = [new for batch in driver.batches for new in batch.new_requests if new.request_id == names[1]]
    assert len(entries) > 1
    assert {new.seed for new in entries} == {entries[0].seed}
    assert list(entries[-1].token_ids[8:]) == driver.token_ids(names[1])[: len(entries[-1].token_ids) - 8]
    assert {new.num_prompt_tokens for new in entries} == {8}
    assert driver.last(names[1]).num_cached_tokens == 0


def test_nothing_is_admitted_in_a_step_that_preempts():
    driver = Driver(num_slots=30, max_req_total_len=30)
    for i in range(2):
        driver.add([i] * 5, max_new_tokens=20, **ANY_LENGTH)
    while driver.scheduler.stats().kv_used_tokens < 29:
        driver.step()
    driver.add([3], max_new_tokens=1)
    before = len(driver.batches)
    while not driver.scheduler.stats().preemptions_total:
        driver.step()
    assert all(not batch.new_requests for batch in driver.batches[before:])
    driver.drain()


@pytest.mark.parametrize("num_slots", [58, 59, 60])
def test_decodes_cannot_starve_a_more_urgent_prompt(num_slots):
    driver = Driver(num_slots=num_slots, max_req_total_len=58, chunked_prefill_size=1, max_lag=0)
    for i in range(2):
        driver.add([i], max_new_tokens=40, priority=-1, **ANY_LENGTH)
    driver.step()
    urgent = driver.add([5] * 40, max_new_tokens=1)
    for _ in range(40):
        driver.step()
    assert driver.scheduler.stats().preemptions_total
    assert driver.token_ids(urgent)
    driver.drain()


def test_a_prompt_is_begun_only_if_it_can_be_ended():
    driver = Driver(num_slots=100, max_req_total_len=100, chunked_prefill_size=10, enable_prefix_cache=False)
    driver.add([1] * 50, max_new_tokens=10, **ANY_LENGTH)
    driver.step()
    driver.add([2] * 60, max_new_tokens=1)
    for _ in range(8):
        driver.step()
    assert driver.scheduler.stats().requests_waiting == 1
    driver.drain()
    assert driver.scheduler.stats().preemptions_total == 0


def test_cached_tokens_give_way_to_running_requests():
    driver = Driver(num_slots=50, max_req_total_len=50)
    for i in range(5):
        driver.add([i] * 40, max_new_tokens=5, **ANY_LENGTH)
    driver.drain()
    stats = driver.scheduler.stats()
    assert stats.preemptions_total == 0
    assert stats.kv_cached_tokens <= stats.kv_total_tokens == 50


def test_nobody_starves_behind_a_stream_of_higher_priority():
    driver = Driver(max_running=1, max_lag=0)
    low = driver.add([1], max_new_tokens=1, priority=-1)
    for _ in range(100):
        driver.now_s += 1.0
        driver.add([2], max_new_tokens=1, priority=0)
        driver.step()
    assert driver.outputs[low]
    driver.drain()
