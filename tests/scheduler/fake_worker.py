"""A worker without a model, and a driver, for scheduler tests.

The fake model's next token is a function of all tokens before it. The fake KV of a position is a hash of the
tokens up to it, and every position that a step relies on is checked before and after the step's own writes: a
slot mixed up, reused too early or taken from a wrong prefix fails here, in the step in which it happens.
"""

import itertools
from collections import deque
from concurrent.futures import Future

from lightllm.engine.recovery import Recovery, StepFailed
from lightllm.messages import EngineRequest, RequestOutput, ScheduledBatch, StepOutput, TokenLogprobs
from lightllm.sampling_params import SamplingParams
from lightllm.scheduler.config import SchedulerConfig
from lightllm.scheduler.scheduler import Scheduler
from tests.scheduler.fake_transport import FakeTransport

VOCAB_SIZE = 5
ANY_LENGTH = {"ignore_eos": True}
EOS = 0


def extend_hash(prefix_hash, token_id):
    return hash((prefix_hash, token_id))


def next_token(prefix_hash):
    return prefix_hash % 7919 % VOCAB_SIZE


def expected_output(prompt, params):
    """What the fake model says, ended as the sampling parameters want; and why it ends."""
    prefix_hash, output = 0, []
    for token_id in prompt:
        prefix_hash = extend_hash(prefix_hash, token_id)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    while True:
        output.append(next_token(prefix_hash))
        prefix_hash = extend_hash(prefix_hash, output[-1])
        if output[-1] in ends and len(output) >= params.min_new_tokens:
            return output, "stop"
        if len(output) == params.max_new_tokens:
            return output, "length"


class Row:
    """What the worker remembers of one row."""

    def __init__(self, new):
        self.new = new
        self.token_ids = dict(enumerate(new.token_ids))
        self.slots = {}

    def hashes(self, stop):
        """Hash of the prefix that ends with each position < stop."""
        return list(itertools.accumulate((self.token_ids[p] for p in range(stop)), extend_hash, initial=0))[
            1:
        ]


class FakeWorker:
    """Executes batches in order; keeps rows and KV as a real worker does."""

    def __init__(self, config: SchedulerConfig, **transport) -> None:
        self.config = config
        self.rows: dict[int, Row] = {}
        self.kv: dict[int, int] = {}
        self.transport = FakeTransport(self.kv, extend_hash, next_token, **transport)

    def run(self, batch: ScheduledBatch) -> StepOutput:
        self._apply(batch)
        self.transport.look(batch)
        columns = (batch.rows, batch.starts, batch.num_new_tokens, batch.is_sampling)
        work = [(self.rows[row], start, start + n, s) for row, start, n, s in zip(*columns, strict=True)]
        written: set[int] = set()
        for row, _, stop, _ in work:
            assert stop < row.new.num_prompt_tokens + row.new.sampling_params.max_new_tokens, (
                "computed too far"
            )
        for i, (row, start, _, _) in enumerate(work):
            self._check(row, start)
            row.token_ids.update(enumerate(batch.drafts.get(i, ()), start + 1))
        for row, start, stop, _ in work:
            for position, prefix_hash in list(enumerate(row.hashes(stop)))[start:]:
                slot = row.slots[position]
                assert slot not in written, f"slot {slot} is written twice in a step"
                written.add(slot)
                self.kv[slot] = prefix_hash
        token_ids: list[list[int]] = []
        for i, (row, _, stop, is_sampling) in enumerate(work):
            self._check(row, stop)
            token_ids.append([])
            if is_sampling:
                drafts = batch.drafts.get(i, [])
                first = stop - len(drafts)
                for draft in [*drafts, None]:
                    position = first + len(token_ids[-1])
                    token_ids[-1].append(next_token(row.hashes(position)[-1]))
                    row.token_ids[position] = token_ids[-1][-1]
                    if token_ids[-1][-1] != draft:
                        break
        self.transport.take(batch)
        return StepOutput(
            step_id=batch.step_id,
            token_ids=token_ids,
            logprobs={
                i: [
                    TokenLogprobs(logprob=len(batch.drafts.get(i, ())) - stop - p)
                    for p in range(len(token_ids[i]))
                ]
                for i, (row, _, stop, is_sampling) in enumerate(work)
                if is_sampling and row.new.sampling_params.logprobs is not None
            },
            prompt_logprobs={
                i: [
                    TokenLogprobs(logprob=-p)
                    for p in range(start + 1, min(stop + 1, row.new.num_prompt_tokens))
                ]
                for i, (row, start, stop, _) in enumerate(work)
                if row.new.sampling_params.prompt_logprobs is not None
            },
            duration_s=0.005 * (1 + sum(batch.num_new_tokens)),
            **self.transport.advance(),
        )

    def _apply(self, batch: ScheduledBatch) -> None:
        config = self.config
        for row in batch.freed_rows:
            del self.rows[row]
        assert not set(batch.freed_rows).intersection(new.row for new in batch.new_requests)
        for new in batch.new_requests:
            assert 0 <= new.row < config.max_running
            self.rows[new.row] = Row(new)
        assert len(set(batch.rows)) == len(batch.rows)
        assert sum(batch.num_new_tokens) <= config.batch_max_tokens
        if config.enable_chunked_prefill:
            assert max(batch.num_new_tokens, default=0) <= config.chunked_prefill_size
        assert min(batch.num_new_tokens, default=1) > 0
        slots = iter(batch.slots)
        for row, start, count in zip(batch.rows, batch.slot_starts, batch.slot_counts, strict=True):
            for position in range(start, start + count):
                slot = next(slots)
                assert 1 <= slot <= config.num_slots
                self.rows[row].slots[position] = slot
        assert next(slots, None) is None

    def _check(self, row: Row, stop: int) -> None:
        for position, prefix_hash in enumerate(row.hashes(stop)):
            slot = row.slots[position]
            assert self.kv.get(slot) == prefix_hash, (
                f"{row.new.request_id}: wrong KV at {position}, slot {slot}"
            )


class Driver:
    """Scheduler + FakeWorker as the engine joins them, with all checks after every call.

    Args:
        max_lag: steps that may be scheduled before the oldest one's result is taken (1: overlap, 0: none).
        transport: arguments of FakeTransport.
    """

    def __init__(self, *, max_lag: int = 1, transport: dict | None = None, **config) -> None:
        defaults = {
            "num_slots": 1000,
            "max_running": 16,
            "batch_max_tokens": 64,
            "chunked_prefill_size": 32,
            "max_req_total_len": 500,
            "eos_token_ids": [EOS],
        }
        self.config = SchedulerConfig(**{**defaults, **config})
        self.scheduler = Scheduler(self.config, seed=1)
        self.worker = FakeWorker(self.config, **(transport or {}))
        self.max_lag = max_lag
        self.now_s = 1000.0
        self.num_steps = 0
        self.num_failures = 0
        self.batches: list[ScheduledBatch] = []
        self.pending: deque[StepOutput] = deque()
        self.requests: dict[str, EngineRequest] = {}
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.reserved: dict[str, int] = {}

    def add(self, prompt: list[int], request_id: str = "", *, check: bool = True, **fields) -> str:
        """Send a request; fields of SamplingParams and of EngineRequest may be mixed."""
        request_id = request_id or f"r{len(self.requests)}"
        own = {name: fields.pop(name) for name in list(fields) if name in EngineRequest.__struct_fields__}
        params = SamplingParams(**fields)
        request = EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling_params=params, **own)
        self.requests[request_id] = request
        self.outputs[request_id] = []
        self._take([self.scheduler.add(request, self.now_s)])
        return request_id

    def abort(self, request_id: str, reason: str = "abort") -> None:
        self._take([self.scheduler.abort(request_id, reason)])

    def step(self) -> None:
        """One turn of the engine's loop."""
        self.num_steps += 1
        self.now_s += 0.01
        self._take(self.scheduler.expire(self.now_s))
        batch = self.scheduler.schedule(self.now_s)
        if batch is not None:
            self.batches.append(batch)
            self.pending.append(self.worker.run(batch))
        for message in self.scheduler.take_reservations():
            assert message.request_id not in self.reserved
            self.reserved[message.request_id] = message.num_cached_tokens
        self.scheduler.check_integrity()
        if len(self.pending) > (self.max_lag if batch is not None and batch.rows else 0):
            self._take(self.scheduler.update(self.pending.popleft()))
        else:
            assert batch is not None or not self.scheduler.has_work, "there is work, but no way on"

    def fail(self) -> None:
        """The oldest step in flight raises; what is behind it is lost, too."""
        self.num_failures += 1
        self.pending.clear()
        recovery = Recovery(self, lambda: self.now_s)  # type: ignore[arg-type]
        recovered = recovery.run(self.scheduler, StepFailed("chance"), self.num_steps)
        self.scheduler = recovered.scheduler
        self._take(list(recovered.outputs))
        assert not self.worker.transport.receipts
        assert not self.worker.transport.shipments

    def submit(self, batch: ScheduledBatch) -> Future[StepOutput]:
        """The executor that a recovery computes with."""
        done: Future[StepOutput] = Future()
        done.set_result(self.worker.run(batch))
        return done

    def drain(self, max_steps: int = 20_000) -> None:
        """Run everything to its end and check that all is given back."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"work is left after {max_steps} steps"
        stats = self.scheduler.stats()
        assert (stats.requests_running, stats.requests_waiting) == (0, 0)
        assert (stats.kv_used_tokens, stats.kv_committed_tokens) == (0, 0)
        assert not self.worker.transport.receipts
        assert not self.worker.transport.shipments
        for request_id in self.requests:
            self.check_outputs(request_id)

    def token_ids(self, request_id: str) -> list[int]:
        return [t for output in self.outputs[request_id] for t in output.new_token_ids]

    def last(self, request_id: str) -> RequestOutput:
        return self.outputs[request_id][-1]

    def check_outputs(self, request_id: str) -> None:
        """Exactly one final output, the last; tokens as the model says; logprobs of each."""
        outputs, request = self.outputs[request_id], self.requests[request_id]
        assert [o.finish_reason for o in outputs].count(None) == len(outputs) - 1, request_id
        reason = outputs[-1].finish_reason
        expected, expected_reason = expected_output(request.prompt_token_ids, request.sampling_params)
        is_receiving = request.recv_kv_from is not None
        known = list(request.output_token_ids)
        if is_receiving:  # the first token behind the KV comes from the sender
            known = expected[: len(known) + 1]
        made = [*known, *self.token_ids(request_id)]
        assert made == expected[: len(made)], f"{request_id} ({reason}): {made}, expected {expected}"
        if reason in ("stop", "length") and outputs[-1].new_token_ids:
            assert (made, reason) == (expected, expected_reason)
        if request.sampling_params.logprobs is not None:
            first = len(request.prompt_token_ids) + len(known)
            found = [-entry.logprob for output in outputs for entry in output.logprobs or []]
            assert found == list(range(first, first + len(found)))
            assert len(found) == len(self.token_ids(request_id))
        if request.send_kv_to is not None:
            assert len(self.token_ids(request_id)) == (reason in ("stop", "length", "handed_over")) or (
                reason in ("abort", "stop", "error")
            )
        if is_receiving:
            assert all(output.prompt_logprobs is None for output in outputs)
        elif request.sampling_params.prompt_logprobs is not None and self.token_ids(request_id):
            entries = outputs[0].prompt_logprobs
            assert entries is not None
            assert [entry and -entry.logprob for entry in entries] == [
                None,
                *range(1, len(request.prompt_token_ids)),
            ]
            assert all(output.prompt_logprobs is None for output in outputs[1:])

    def _take(self, outputs: list[RequestOutput | None]) -> None:
        self.scheduler.check_integrity()
        for output in outputs:
            if output is not None:
                self.outputs[output.request_id].append(output)
