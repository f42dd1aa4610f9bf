"""Order of waiting requests: priority, ageing, arrival, length."""

import itertools
from array import array

import pytest

from lightllm.messages import EngineRequest
from lightllm.sampling_params import SamplingParams
from lightllm.scheduler.cache import NullPrefixCache, PrefixCache
from lightllm.scheduler.policy import AGEING_S, POLICIES, WaitingQueue, urgency
from lightllm.scheduler.request import Request, RequestState

ARRIVALS = itertools.count()


def make(name, *, arrival_s=0.0, priority=0, prompt=(1,)):
    message = EngineRequest(
        request_id=name, prompt_token_ids=list(prompt), sampling_params=SamplingParams(), priority=priority
    )
    request = Request(message, arrival_s=arrival_s, seed=0, end_token_ids=frozenset())
    request.rank = (urgency(request), next(ARRIVALS))
    return request


def order(policy, requests, cache=None):
    queue = WaitingQueue(POLICIES[policy], cache or NullPrefixCache(100))
    for request in requests:
        queue.push(request)
    names = []
    while (request := queue.peek()) is not None:
        names.append(request.request_id)
        assert queue.pop() is request
    return names


def test_fcfs_is_by_arrival_among_equals():
    assert order("fcfs", [make("c", arrival_s=3), make("a", arrival_s=1), make("b", arrival_s=2)]) == [
        "a",
        "b",
        "c",
    ]


def test_same_arrival_is_by_order_of_coming():
    requests = [make(name) for name in "abc"]
    assert order("fcfs", requests[::-1]) == ["a", "b", "c"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_higher_priority_goes_first(policy):
    assert order(
        policy, [make("low", priority=-1), make("normal", arrival_s=2), make("high", arrival_s=4, priority=1)]
    ) == [
        "high",
        "normal",
        "low",
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_waiting_outweighs_priority_in_bounded_time(policy):
    old = make("old", priority=-10)
    newer = make("newer", arrival_s=20 * AGEING_S - 1, priority=10)
    newest = make("newest", arrival_s=20 * AGEING_S + 1, priority=10)
    assert order(policy, [newest, newer, old]) == ["newer", "old", "newest"]


def test_shortest_prefill_counts_what_is_not_cached():
    cache = PrefixCache(1000)
    known = make("known", prompt=range(200))
    cache.acquire(known)
    cache.extend(known, 200)
    known.num_computed_tokens = 200
    cache.release(known)
    known.token_ids = array("i", range(205))
    requests = [make("long", prompt=range(1000, 1100)), known, make("short", prompt=range(2000, 2020))]
    assert order("shortest_prefill", requests, cache) == ["known", "short", "long"]
    assert order("fcfs", requests, cache) == ["known", "long", "short"]


def test_a_long_prompt_is_overtaken_for_a_bounded_time_only():
    long = make("long", prompt=[1] * 1000)
    shorts = [make(f"short {i}", arrival_s=i) for i in range(20)]
    assert order("shortest_prefill", [long, *shorts]).index("long") == 10


def test_finished_requests_disappear_and_cost_no_memory():
    queue = WaitingQueue(POLICIES["fcfs"], NullPrefixCache(10))
    stays = make("stays", arrival_s=0)
    queue.push(stays)
    for i in range(10_000):
        request = make(str(i), arrival_s=1)
        queue.push(request)
        request.state = RequestState.FINISHED
    assert len(queue._heap) < 200
    assert queue.pop() is stays
    assert queue.peek() is None
