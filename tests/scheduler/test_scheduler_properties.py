"""Whatever comes in whatever order: right tokens, one end for each request, all memory back.

Driver and FakeWorker (fake_worker.py) check every step; here hypothesis chooses limits, requests and moments.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lightllm.messages import KVSource, KVTarget
from tests.scheduler.fake_worker import VOCAB_SIZE, Driver


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_slots=st.sampled_from([8, 12, 20, 40, 80, 300]),
        share_of_pool=st.floats(0.3, 1.2),
        chunk=st.integers(1, 16),
        budget=st.integers(1, 30),
        max_running=st.integers(1, 8),
        max_queued=st.sampled_from([0, 3, 100]),
        max_lag=st.sampled_from([0, 1, 1, 2, 3]),
        policy=st.sampled_from(["fcfs", "shortest_prefill"]),
        is_caching=st.sampled_from([True, True, True, False]),
        is_chunking=st.sampled_from([True, True, True, False]),
        seed=st.integers(0, 1000),
        failure_share=st.sampled_from([0.0, 0.1, 0.5]),
        pace=st.sampled_from([1.0, 0.3, 0.05]),
        lease_s=st.sampled_from([0.15, 2.0, 30.0]),
        draft_ngram=st.sampled_from([0, 0, 1, 3, 16]),
    )
    def start(
        self,
        num_slots,
        share_of_pool,
        chunk,
        budget,
        max_running,
        max_queued,
        max_lag,
        policy,
        is_caching,
        is_chunking,
        seed,
        failure_share,
        pace,
        lease_s,
        draft_ngram,
    ):
        self.max_len = max(2, int(num_slots * share_of_pool))
        self.driver = Driver(
            max_lag=max_lag,
            num_slots=num_slots,
            max_running=max_running,
            batch_max_tokens=budget if is_chunking else max(budget, self.max_len),
            chunked_prefill_size=chunk,
            max_req_total_len=self.max_len,
            max_queued_requests=max_queued,
            schedule_policy=policy,
            enable_prefix_cache=is_caching,
            enable_chunked_prefill=is_chunking,
            kv_lease_s=lease_s,
            kv_admission_s=0.3,
            transport={"seed": seed, "failure_share": failure_share, "pace": pace},
            draft_ngram=draft_ngram,
        )

    @rule(
        data=st.data(),
        num_samples=st.sampled_from([1, 1, 1, 2, 4]),
        priority=st.integers(-2, 2),
        lifetime_s=st.sampled_from([None, None, None, 0.0, 0.05, 0.3]),
        ignore_eos=st.booleans(),
        logprobs=st.sampled_from([None, None, 0]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        is_failover=st.sampled_from([False, False, False, True]),
        leg=st.sampled_from([None, None, "send", "recv"]),
    )
    def add(
        self, data, num_samples, priority, lifetime_s, ignore_eos, logprobs, prompt_logprobs, is_failover, leg
    ):
        # Prompts share beginnings: few different first tokens, then a choice at each of a few places.
        length = data.draw(st.integers(1, self.max_len - 1))
        places = data.draw(st.sets(st.integers(0, length - 1), max_size=2))
        prompt = [int(i in places) for i in range(length)]
        max_new = data.draw(st.integers(1, self.max_len - length + 1))  # one too many at times
        fields = {
            "max_new_tokens": max_new,
            "min_new_tokens": data.draw(st.integers(0, max_new)),
            "ignore_eos": ignore_eos,
            "stop_token_ids": data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=1)),
            "priority": priority,
            "deadline_s": None if lifetime_s is None else self.driver.now_s + lifetime_s,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
        }
        if leg == "send":
            fields["send_kv_to"] = KVTarget(node_id="d", epoch=1, address="", ticket="t")
        elif leg == "recv":
            fields["recv_kv_from"] = KVSource(node_id="p", epoch=1, ticket="t")
        leader = self.driver.add(prompt, **fields)
        for i in range(1, num_samples):
            self.driver.add(prompt, after_request_id=leader, sample_index=i, **fields)
        if is_failover and leg is None and self.driver.token_ids(leader) == []:
            self._fail_over(leader)

    def _fail_over(self, request_id):
        """Run for a while, then go on with what there is as a new request, as another node would."""
        for _ in range(3):
            self.step_once()
        request = self.driver.requests[request_id]
        made = self.driver.token_ids(request_id)
        self.driver.abort(request_id)
        params = {
            name: getattr(request.sampling_params, name) for name in ("max_new_tokens", "min_new_tokens")
        }
        params["ignore_eos"] = request.sampling_params.ignore_eos
        params["stop_token_ids"] = request.sampling_params.stop_token_ids
        self.driver.add(request.prompt_token_ids, output_token_ids=made, **params)

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data(), reason=st.sampled_from(["abort", "stop"]))
    def abort(self, data, reason):
        self.driver.abort(data.draw(st.sampled_from(sorted(self.driver.requests))), reason)

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def renew(self, data):
        names = data.draw(st.lists(st.sampled_from(sorted(self.driver.requests)), max_size=5))
        self.driver.scheduler.renew([*names, "unknown"], self.driver.now_s)

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.step_once()

    def step_once(self):
        self.driver.step()

    @precondition(lambda self: self.driver.pending)
    @rule()
    def fail(self):
        self.driver.fail()

    @rule()
    def drain(self):
        self.driver.drain()

    def teardown(self):
        if hasattr(self, "driver"):
            self.driver.drain()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=30)
