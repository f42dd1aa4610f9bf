"""What the scheduler promises about KV that comes from other nodes, or goes there; one promise a test."""

import pytest

from lightllm.messages import KVSource, KVTarget
from lightllm.sampling_params import SamplingParams
from tests.scheduler.fake_worker import ANY_LENGTH, Driver, expected_output

SOURCE = KVSource(node_id="P", epoch=1, ticket="t")
NEVER = {"pace": 0.0}


TARGET = KVTarget(node_id="D", epoch=1, address="tcp://d:1", ticket="t")


def steps(driver, count):
    for _ in range(count):
        driver.step()


def tokens_of(prompt, count):
    return expected_output(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True))[0]


# ------------------------------------------------------------ receiving


def test_slots_are_reserved_beyond_the_cached_prefix_and_the_master_is_told():
    driver = Driver(transport=NEVER)
    driver.add([1] * 20, max_new_tokens=1)
    driver.drain()
    name = driver.add([1] * 20 + [2] * 10, max_new_tokens=5, recv_kv_from=SOURCE)
    driver.step()
    assert driver.reserved == {name: 20}
    (order,) = driver.batches[-1].kv_recvs
    assert (order.start, len(order.slots), list(order.token_ids)) == (20, 10, [1] * 20 + [2] * 10)
    assert driver.batches[-1].rows == []
    assert driver.scheduler.stats().kv_used_tokens == 30
    driver.abort(name)
    assert driver.scheduler.stats().kv_used_tokens == 30  # bytes may still land
    driver.step()
    assert driver.batches[-1].kv_cancels == [name]
    driver.worker.transport.pace = 1.0
    driver.drain()


def test_a_received_request_decodes_from_the_second_token_on_and_shares_its_prompt():
    driver = Driver()
    prompt = [1, 2, 3] * 10
    name = driver.add(prompt, max_new_tokens=6, recv_kv_from=SOURCE, **ANY_LENGTH)
    driver.drain()
    assert driver.token_ids(name) == tokens_of(prompt, 6)[1:]
    assert all(sum(batch.num_new_tokens) <= 1 for batch in driver.batches), "the prompt was computed"
    again = driver.add(prompt, max_new_tokens=1)
    driver.drain()
    assert driver.last(again).num_cached_tokens == len(prompt) - 1


def test_a_failed_transfer_ends_the_leg_and_the_request_goes_on_as_a_new_one():
    driver = Driver(transport={"failure_share": 1.0})
    prompt = [2, 1] * 8
    name = driver.add(prompt, max_new_tokens=6, recv_kv_from=SOURCE)
    driver.drain()
    assert driver.last(name).error.code == "kv_transfer_failed"
    known = tokens_of(prompt, 2)
    other = driver.add(prompt, output_token_ids=known, max_new_tokens=6, **ANY_LENGTH)
    driver.drain()
    assert [*known, *driver.token_ids(other)] == tokens_of(prompt, 6)


def test_known_outputs_are_received_as_well():
    driver = Driver()
    prompt = [1, 2, 2] * 5
    known = tokens_of(prompt, 3)
    name = driver.add(prompt, output_token_ids=known, max_new_tokens=6, recv_kv_from=SOURCE, **ANY_LENGTH)
    driver.drain()
    assert driver.token_ids(name) == tokens_of(prompt, 6)[4:]


def test_a_first_token_that_is_the_last_ends_the_leg_without_tokens():
    driver = Driver()
    name = driver.add([1, 2, 3], max_new_tokens=1, recv_kv_from=SOURCE)
    driver.drain()
    assert driver.token_ids(name) == []
    assert driver.last(name).finish_reason in ("stop", "length")


def test_without_room_it_waits_a_bounded_time():
    driver = Driver(num_slots=60, transport=NEVER)
    first = driver.add([1] * 40, max_new_tokens=5, recv_kv_from=SOURCE)
    second = driver.add([2] * 40, max_new_tokens=5, recv_kv_from=SOURCE)
    driver.step()
    assert list(driver.reserved) == [first]
    driver.now_s += 5.1
    driver.step()
    assert driver.last(second).error.code == "kv_full"
    assert not driver.outputs[first]
    driver.worker.transport.pace = 1.0
    driver.drain()
    assert driver.last(first).error is None


def test_a_sibling_is_received_once_the_first_ones_kv_is_there():
    driver = Driver(transport=NEVER)
    leader = driver.add([1] * 30, max_new_tokens=3, recv_kv_from=SOURCE)
    sibling = driver.add([1] * 30, max_new_tokens=3, recv_kv_from=SOURCE, after_request_id=leader)
    driver.step()
    driver.now_s += 20.0  # the sibling's time to be admitted has not begun
    steps(driver, 3)
    assert driver.reserved == {leader: 0}
    driver.worker.transport.pace = 1.0
    driver.drain()
    assert driver.reserved == {leader: 0, sibling: 29}


def test_a_received_request_that_is_preempted_computes_itself():
    driver = Driver(num_slots=40, max_lag=0)
    names = [driver.add([i] * 15, max_new_tokens=20, recv_kv_from=SOURCE, **ANY_LENGTH) for i in (1, 2)]
    driver.drain()
    assert driver.scheduler.stats().preemptions_total > 0
    for i, name in zip((1, 2), names, strict=True):
        assert driver.token_ids(name) == tokens_of([i] * 15, 20)[1:]


# ------------------------------------------------------------ sending


def test_kv_leaves_chunk_by_chunk_and_the_row_is_free_before_the_hand_over():
    driver = Driver(chunked_prefill_size=10, max_running=1, transport=NEVER, max_lag=0)
    prompt = [1, 2] * 12
    name = driver.add(prompt, max_new_tokens=9, send_kv_to=TARGET, **ANY_LENGTH)
    steps(driver, 3)
    orders = [order for batch in driver.batches for order in batch.kv_sends]
    assert [(order.start, len(order.slots)) for order in orders] == [(0, 10), (10, 10), (20, 4)]
    assert not any(order.is_computed for order in orders)
    assert [bool(order.token_ids) for order in orders] == [False, False, True]
    assert driver.token_ids(name) == tokens_of(prompt, 1)
    assert driver.last(name).finish_reason is None
    other = driver.add([3] * 5, max_new_tokens=2, **ANY_LENGTH)
    steps(driver, 3)
    assert driver.last(other).finish_reason == "length"
    driver.worker.transport.pace = 1.0
    driver.drain()
    assert driver.last(name).finish_reason == "handed_over"


def test_what_the_sender_had_in_its_cache_leaves_before_the_first_chunk():
    driver = Driver()
    driver.add([1] * 25, max_new_tokens=1)
    driver.drain()
    name = driver.add([1] * 30, max_new_tokens=9, send_kv_to=TARGET)
    driver.step()
    cached, computed = driver.batches[-1].kv_sends
    assert (cached.start, len(cached.slots), cached.is_computed) == (0, 25, True)
    assert (computed.start, len(computed.slots), computed.is_computed) == (25, 5, False)
    assert (list(cached.token_ids), list(computed.token_ids)) == ([], [1] * 30)
    driver.drain()
    assert driver.last(name).num_cached_tokens == 25


def test_a_first_token_that_ends_the_request_ends_it_as_always():
    driver = Driver(transport=NEVER)
    name = driver.add([1, 2, 3], max_new_tokens=1, send_kv_to=TARGET)
    steps(driver, 3)
    assert driver.last(name).finish_reason in ("stop", "length")
    assert len(driver.token_ids(name)) == 1
    assert driver.scheduler.stats().kv_used_tokens == 3  # the transport may still read
    driver.worker.transport.pace = 1.0
    driver.drain()


def test_a_transfer_that_fails_ends_the_leg_and_keeps_the_prefix():
    driver = Driver(chunked_prefill_size=10, transport={"failure_share": 1.0})
    name = driver.add([1] * 40, max_new_tokens=5, send_kv_to=TARGET)
    driver.drain()
    assert driver.last(name).error.code == "kv_transfer_failed"
    assert driver.scheduler.stats().kv_cached_tokens >= 10


def test_one_that_sends_is_not_preempted():
    driver = Driver(num_slots=40, chunked_prefill_size=1, max_lag=1)
    urgent = driver.add([1] * 5, max_new_tokens=30, priority=2, **ANY_LENGTH)
    steps(driver, 8)
    sending = driver.add([2] * 20, max_new_tokens=5, send_kv_to=TARGET, **ANY_LENGTH)
    driver.drain()
    assert driver.last(sending).finish_reason == "handed_over"
    assert driver.scheduler.stats().preemptions_total > 0
    assert len(driver.token_ids(urgent)) == 30


def test_a_leg_does_one_of_the_two():
    driver = Driver()
    name = driver.add([1] * 5, send_kv_to=TARGET, recv_kv_from=SOURCE)
    assert driver.last(name).error.code == "internal"


# ------------------------------------------------------------ leases


@pytest.mark.parametrize("fields", [{"send_kv_to": TARGET}, {"recv_kv_from": SOURCE}])
def test_a_leg_ends_with_its_lease(fields):
    driver = Driver(transport=NEVER)
    renewed = driver.add([1] * 5, max_new_tokens=50, **fields)
    forgotten = driver.add([2] * 5, max_new_tokens=50, **fields)
    plain = driver.add([3] * 5, max_new_tokens=60, **ANY_LENGTH)
    steps(driver, 3)
    driver.now_s += 20
    driver.scheduler.renew([renewed, plain, "unknown"], driver.now_s)
    driver.now_s += 15
    driver.step()
    assert driver.last(forgotten).error.code == "lease_expired"
    assert "15" in driver.last(forgotten).error.message or "35" in driver.last(forgotten).error.message
    assert not driver.outputs[renewed] or driver.last(renewed).finish_reason is None
    driver.now_s += 16
    driver.step()
    assert driver.last(renewed).error.code == "lease_expired"
    driver.worker.transport.pace = 1.0
    driver.drain()
    assert driver.last(plain).finish_reason == "length"


def test_a_decoding_leg_has_a_lease_as_well():
    driver = Driver()
    name = driver.add([1] * 5, max_new_tokens=400, recv_kv_from=SOURCE, **ANY_LENGTH)
    steps(driver, 10)
    assert driver.token_ids(name)
    driver.now_s += 31
    driver.step()
    assert driver.last(name).error.code == "lease_expired"
    driver.drain()


# ------------------------------------------------------------ asking after transfers


def test_batches_without_rows_only_ask_and_are_no_steps():
    driver = Driver(transport=NEVER)
    driver.add([1] * 5, max_new_tokens=3, recv_kv_from=SOURCE)
    steps(driver, 10)
    assert driver.scheduler.stats().steps_total == 0
    assert all(not batch.rows for batch in driver.batches)
    assert driver.scheduler.is_only_transferring
    driver.worker.transport.pace = 1.0
    driver.drain()


def test_an_ended_id_is_in_use_until_its_slots_are_free():
    driver = Driver(transport=NEVER)
    name = driver.add([1] * 5, max_new_tokens=3, recv_kv_from=SOURCE)
    driver.step()
    driver.abort(name)
    output = driver.scheduler.add(driver.requests[name], driver.now_s)
    assert output.error.code == "internal"
    driver.worker.transport.pace = 1.0
    driver.drain()
