"""What a scheduler tells of requests: where they are, what they hold, what happened when."""

from lightllm.messages import KVSource, KVTarget
from lightllm.scheduler import history
from lightllm.scheduler.request import MAX_EVENTS
from tests.scheduler.fake_worker import ANY_LENGTH, Driver

SOURCE = KVSource(node_id="P", epoch=1, ticket="t")
TARGET = KVTarget(node_id="D", epoch=1, address="tcp://d:1", ticket="t")
NEVER = {"pace": 0.0}


def view(driver, name):
    (found,) = driver.scheduler.inspect(["unknown", name])
    return found


def events(driver, name):
    return [event for event, _ in view(driver, name).events]


def test_a_receiving_leg_from_its_reservation_to_the_last_token():
    driver = Driver(transport=NEVER)
    begin_s = driver.now_s
    name = driver.add([1] * 20, max_new_tokens=3, recv_kv_from=SOURCE)
    assert (view(driver, name).state, view(driver, name).num_kv_tokens) == ("waiting", 0)
    driver.step()
    seen = view(driver, name)
    assert (seen.state, seen.num_tokens, seen.num_computed_tokens, seen.num_kv_tokens) == (
        "receiving_kv",
        20,
        0,
        20,
    )
    assert seen.lease_until_s == begin_s + driver.config.kv_lease_s
    driver.worker.transport.pace = 1.0
    driver.drain()
    seen = view(driver, name)
    assert (seen.state, seen.num_kv_tokens) == ("finished", 0)
    assert events(driver, name) == ["queued", "kv_reserved", "kv_received", "finished"]
    times = [time_s for _, time_s in seen.events]
    assert times == sorted(times)
    assert begin_s <= times[0] <= times[-1] <= driver.now_s


def test_a_sending_leg_whose_slots_are_free_later_than_it_ends():
    driver = Driver(transport=NEVER)
    name = driver.add([1] * 20, max_new_tokens=3, send_kv_to=TARGET, **ANY_LENGTH)
    for _ in range(3):
        driver.step()
    assert view(driver, name).state == "sending_kv"
    driver.abort(name)
    assert events(driver, name) == ["queued", "prefill_start", "prompt_computed", "finished"]
    driver.worker.transport.pace = 1.0
    driver.drain()
    assert events(driver, name)[-1] == "kv_failed: chance"


def test_preemptions_are_told_and_a_list_has_an_end():
    driver = Driver(num_slots=40, max_lag=0)
    names = [driver.add([i] * 15, max_new_tokens=20, **ANY_LENGTH) for i in (1, 2)]
    driver.drain()
    assert ["queued", "prefill_start", "preempted", "prefill_start", "finished"] in [
        events(driver, name) for name in names
    ]
    request = driver.scheduler.requests.get(driver.add([1]))
    assert request is not None
    for i in range(2 * MAX_EVENTS):
        request.note(f"e{i}", 1.0)
    told = [event for event, _ in request.events]
    assert (len(told), told[0], told[-1]) == (MAX_EVENTS, "queued", f"e{2 * MAX_EVENTS - 1}")
    driver.drain()


def test_the_oldest_that_ended_are_forgotten():
    driver = Driver()
    names = []
    for _ in range(history.KEPT + 10):
        names.append(driver.add([1, 2], max_new_tokens=1))
        driver.drain()
    assert [seen.request_id for seen in driver.scheduler.inspect(names)] == names[10:]
