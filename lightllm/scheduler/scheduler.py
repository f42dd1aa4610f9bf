"""Scheduler: the one owner of all requests; decides what each step computes.

    add() -> schedule() -> [executor] -> update() -> outputs

A step is one number per request: how many of its tokens are computed now. Steps are executed strictly in the
order of schedule(), and update() may lag behind by any number of them; therefore whatever a scheduled step
writes counts as there for every later one, and slots or rows that are given up can be handed out at once.
Only slots that a KV transport may still touch stay with their request until it reports (see transfers.py).
Knows no torch, no threads and no clock (times are arguments, Unix seconds). Runs in the engine process.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Iterator, Mapping
from operator import attrgetter

from lightllm.messages import (
    EngineRequest,
    EngineStats,
    KVArrival,
    KVReserved,
    RequestFailure,
    RequestOutput,
    RequestView,
    ScheduledBatch,
    StepOutput,
)
from lightllm.scheduler.admission import expiry, make_request, refusal
from lightllm.scheduler.batch import BatchColumns, Step
from lightllm.scheduler.cache import NullPrefixCache, PrefixCache
from lightllm.scheduler.config import SchedulerConfig, check_config
from lightllm.scheduler.counters import Counters
from lightllm.scheduler.drafting import Drafter
from lightllm.scheduler.history import History
from lightllm.scheduler.policy import POLICIES, WaitingQueue, urgency
from lightllm.scheduler.request import Request, RequestState
from lightllm.scheduler.rows import Rows
from lightllm.scheduler.transfers import Transfers

_RANK = attrgetter("rank")


class Scheduler:
    """Admit, compose, account, finish.

    Args:
        config: see SchedulerConfig.
        seed: of the generator that draws seeds for requests without one; None: from the system.

    Raises:
        ConfigError: the configuration could leave a request waiting for ever.
    """

    def __init__(self, config: SchedulerConfig, *, seed: int | None = None) -> None:
        check_config(config)
        self._config = config
        self._cache = (PrefixCache if config.enable_prefix_cache else NullPrefixCache)(config.num_slots)
        self._queue = WaitingQueue(POLICIES[config.schedule_policy], self._cache)
        self._drafter = Drafter(config.draft_ngram) if config.draft_ngram else None
        self._seeds = random.Random(seed)
        self._eos_token_ids = frozenset(config.eos_token_ids)

        # All live requests by id. A running one is in exactly one of the next two: _prefilling has known
        # tokens to compute; _decoding has one more, whose value may still be in flight. Those that only wait
        # for a transfer are in _transfers.
        self._requests: dict[str, Request] = {}
        self._prefilling: dict[str, Request] = {}
        self._decoding: dict[str, Request] = {}
        self._transfers = Transfers()
        # Received since the last step: they decode, but the worker does not know them yet.
        self._received: list[Request] = []
        self._rows = Rows(config.max_rows)
        self._steps: deque[Step] = deque()
        # A lower bound: no live request ends by itself earlier.
        self._next_expiry_s = math.inf
        self._now_s = 0.0

        self._num_added = 0
        self._step_ids = itertools.count()
        self._counters, self._past = Counters(), History()

    # ------------------------------------------------------------ the outside: requests come and go

    @property
    def has_work(self) -> bool:
        """Whether any request or transfer is alive or any step's result is to come."""
        return bool(self._requests or self._steps or self._transfers.live)

    @property
    def is_only_transferring(self) -> bool:
        """Whether nothing is to be computed until a transfer ends or a message comes."""
        return bool(self._transfers.live) and not (self._prefilling or self._decoding)

    @property
    def requests(self) -> Mapping[str, Request]:
        """All live requests by id."""
        return self._requests

    def suspects(self) -> list[str]:
        """Live requests of the oldest step in flight."""
        return [r.request_id for r in self._steps[0].requests if r.request_id in self._requests]

    def last_orders(self) -> ScheduledBatch:
        """End all transfers: behind this batch no transport touches slots of this scheduler any more."""
        cancels = list(self._transfers.live)
        return ScheduledBatch(step_id=next(self._step_ids), kv_cancels=cancels, is_restart=True)

    def successor(self) -> Scheduler:
        """An empty scheduler that goes on counting where this one is, which is not to be used any more."""
        other = Scheduler(self._config)
        other._counters, other._step_ids, other._past = self._counters, self._step_ids, self._past
        return other

    def add(self, message: EngineRequest, now_s: float, *, is_leased: bool = False) -> RequestOutput | None:
        """Accept a request; it will end in exactly one output with a finish_reason.

        Args:
            is_leased: it ends when it is not renewed; those that send or receive KV always do.

        Returns:
            That output at once if the request is refused, or has nothing left to generate; else None.
        """
        self._now_s = now_s
        failure = self._refusal(message)
        if failure is not None:
            return RequestOutput(request_id=message.request_id, finish_reason="error", error=failure)
        request = self._make_request(message, now_s)
        if is_leased or message.send_kv_to is not None or message.recv_kv_from is not None:
            request.lease_until_s = now_s + self._config.kv_lease_s
        reason = request.finish_reason() if message.output_token_ids else None
        if reason is not None:
            return request.final_output(reason)
        self._requests[request.request_id] = request
        self._next_expiry_s = min(self._next_expiry_s, request.expiry_s)
        leader = self._requests.get(message.after_request_id or "")
        if leader is None or leader.is_prompt_computed:
            self._enqueue(request)
        else:
            self._queue.hold(request, leader)
        return None

    def abort(self, request_id: str, reason: str) -> RequestOutput | None:
        """End a request at once; what is in flight for it is dropped. None if there is no such request."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._finish(request)
        return request.final_output(reason)

    def renew(self, request_ids: list[str], now_s: float) -> None:
        """Extend the leases of these requests; unknown ones and those without a lease are passed over."""
        for request in filter(None, map(self._requests.get, request_ids)):
            if request.lease_until_s < math.inf:
                request.lease_until_s = now_s + self._config.kv_lease_s

    def expire(self, now_s: float) -> list[RequestOutput]:
        """End all requests whose deadline, lease or time to be admitted has passed; costs nothing else."""
        if now_s < self._next_expiry_s:
            return []
        outputs = []
        for request in [r for r in self._requests.values() if r.expiry_s <= now_s]:
            failure = expiry(request, now_s, lease_s=self._config.kv_lease_s)
            self._finish(request)
            outputs.append(request.final_output("error", failure))
        self._next_expiry_s = min((r.expiry_s for r in self._requests.values()), default=math.inf)
        return outputs

    # ------------------------------------------------------------ one step: out and back

    def schedule(self, now_s: float) -> ScheduledBatch | None:
        """Compose the next step: all decodes, then chunks of running prefills, then new requests.

        Returns:
            The batch, which must be executed in this order; None if there is nothing to do now. One without
            rows carries orders for transfers, or asks after them when no other step would.
        """
        self._now_s = now_s
        batch = BatchColumns(self._config.batch_max_tokens)
        num_preemptions = self._counters.num_preemptions
        decodes, drafts = self._preempt_if_full(), list[int]()
        if self._drafter is not None:
            room = min(self._config.max_chunk, batch.num_tokens_left, self._cache.num_available) - 1
            decodes, drafts = self._drafter.choose(decodes, is_alone=len(self._requests) == 1, room=room)
        self._introduce_received(batch)
        self._add_decodes(batch, decodes, drafts)
        for request in sorted(self._prefilling.values(), key=_RANK):
            self._add_chunk(batch, request)
        if self._counters.num_preemptions == num_preemptions:
            self._admit(batch, now_s)
        is_asking = bool(self._transfers.live) and not self._steps
        if not (batch.requests or self._transfers.has_orders or is_asking):
            return None
        prefills = batch.chunks(len(decodes))
        for request, count in prefills:
            self._cache.share(request)
            if request.send_kv_to is not None:
                self._transfers.ship(request, count, now_s)
            if request.is_prompt_computed:
                self._release_siblings(request)
        return self._emit(batch, "decode" if not prefills else "mixed" if decodes else "prefill")

    def update(self, output: StepOutput) -> list[RequestOutput]:
        """Take over the result of the oldest scheduled step.

        Returns:
            One output for each request that got a token, and for each that ends with its transfer; tokens of
            requests that have ended are dropped.
        """
        batch, requests, phase = self._steps.popleft()
        assert output.step_id == batch.step_id, f"result of step {output.step_id}, expected {batch.step_id}"
        self._counters.note_step(batch, output, phase)
        if self._drafter is not None:
            self._drafter.note(output, sum(batch.num_new_tokens))
        for index, entries in output.prompt_logprobs.items():
            requests[index].add_prompt_logprobs(batch.starts[index], entries)
        finished, running = RequestState.FINISHED, RequestState.RUNNING
        drafts, logprobs, num_tokens = batch.drafts, output.logprobs, 0
        outputs: list[RequestOutput] = []
        for index, (request, is_sampling, new_token_ids) in enumerate(
            zip(requests, batch.is_sampling, output.token_ids, strict=True)
        ):
            if not is_sampling or request.state is finished:
                continue
            if index in drafts:
                assert self._drafter is not None
                new_token_ids = self._drafter.settle(request, new_token_ids, output.duration_s)
                if request.state is running:
                    self._cache.trim(request)
            else:
                (token_id,) = new_token_ids
                request.token_ids.append(token_id)
                request.num_in_flight -= 1
            num_tokens += len(new_token_ids)
            outputs.append(request.token_output(new_token_ids, logprobs.get(index)))
            if outputs[-1].finish_reason is not None:
                self._finish(request)
            elif request.state is not running and not request.num_in_flight:
                self._go_on_elsewhere(request)
        self._counters.num_generated_tokens += num_tokens
        if self._transfers.live:
            outputs += self._take_transfers(output)
        return outputs

    # ------------------------------------------------------------ adding

    def _refusal(self, message: EngineRequest) -> RequestFailure | None:
        """Why a request cannot be accepted; None if it can."""
        return refusal(
            message,
            is_in_use=message.request_id in self._requests or message.request_id in self._transfers.live,
            max_total_len=self._config.max_total_len,
            num_waiting=self._num_waiting,
            max_waiting=self._config.max_queued_requests + self._rows.num_free,
        )

    def _make_request(self, message: EngineRequest, now_s: float) -> Request:
        seed = message.sampling_params.seed
        seed = self._seeds.getrandbits(63) if seed is None else seed
        request = make_request(message, now_s, seed=seed, eos_token_ids=self._eos_token_ids)
        self._num_added += 1
        request.rank = (urgency(request), self._num_added)
        return request

    def _enqueue(self, request: Request) -> None:
        if request.recv_kv_from is not None:
            request.admit_until_s = self._now_s + self._config.kv_admission_s
            self._next_expiry_s = min(self._next_expiry_s, request.admit_until_s)
        self._queue.push(request)

    # ------------------------------------------------------------ composing a step

    def _preempt_if_full(self) -> list[Request]:
        """Make sure that every running request can get a slot now, at the cost of the least urgent ones.

        The most urgent one is never preempted, so there is always progress. Neither are those that send KV:
        what they need was reserved at admission, and only decodes have taken of it since. Returns the decodes
        that can go on; the others wait for their last token.
        """
        while True:
            # A decode that computes position p samples the token at p + 1.
            ready = [r for r in self._decoding.values() if r.num_computed_tokens + 1 < r.max_num_tokens]
            if len(ready) + len(self._prefilling) <= self._cache.num_available:
                return ready
            self._preempt(max((r for r in self._running() if r.send_kv_to is None), key=_RANK))

    def _preempt(self, request: Request) -> None:
        """Put a running request back into the queue; what it has computed stays cached if there is room."""
        self._leave(request)
        self._cache.release(request)
        request.note("preempted", self._now_s)
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        self._counters.num_preemptions += 1
        if not request.num_in_flight:
            self._queue.push(request)  # else update() does

    def _introduce_received(self, batch: BatchColumns) -> None:
        """Tell the worker of the requests whose KV has arrived, and which decode from now on."""
        for request in self._received:
            if request.state is RequestState.RUNNING and not request.is_in_row:
                self._introduce(request, batch)
        self._received.clear()

    def _introduce(self, request: Request, batch: BatchColumns) -> None:
        request.is_in_row = True
        batch.new_requests.append(request.start_message(self._config.eos_token_ids))

    def _add_decodes(self, batch: BatchColumns, requests: list[Request], drafts: list[int]) -> None:
        """Schedule one token of each: the one sampled by its last step, known here or not; and the drafts
        behind it of the one request that has some."""
        count = 1 + len(drafts)
        if drafts:
            self._cache.extend(requests[0], count)
            batch.add_drafted(requests[0], drafts)
        else:
            batch.add_decodes(requests, self._cache.extend_each(requests))
        for request in requests:
            request.num_computed_tokens += count
            request.num_in_flight += count

    def _add_chunk(self, batch: BatchColumns, request: Request) -> None:
        """Schedule as many of a running request's known tokens as the step allows; may be none."""
        num_remaining = request.num_remaining_tokens
        count = min(num_remaining, self._config.max_chunk, batch.num_tokens_left, self._cache.num_available)
        if not count:
            return
        self._cache.extend(request, count)
        batch.add_chunk(request, count, is_sampling=count == num_remaining)
        request.num_computed_tokens += count
        if count == num_remaining:
            request.num_in_flight += 1
            del self._prefilling[request.request_id]
            if request.send_kv_to is None:
                self._decoding[request.request_id] = request
            else:
                request.state = RequestState.SENDING_KV
                self._transfers.sending[request.request_id] = request

    def _admit(self, batch: BatchColumns, now_s: float) -> None:
        """Start waiting requests, in order, while the step and the pool have room.

        There must be slots for all of a request's known tokens, not for its next chunk only, beside those
        that running prefills still need and one for each running request: a prompt begun can be ended. Those
        that receive their KV take all these slots at once.
        """
        num_reserved = len(self._decoding) + len(self._prefilling) + len(self._transfers.receiving)
        num_reserved += sum(request.num_remaining_tokens for request in self._prefilling.values())
        while batch.num_tokens_left and self._rows.num_free and self._cache.num_available > num_reserved:
            request = self._queue.peek()
            if request is None:
                return
            if request.deadline_s <= now_s:
                self._queue.pop()
                continue
            self._cache.acquire(request)
            num_needed = request.num_remaining_tokens
            is_too_long = num_needed > batch.num_tokens_left and not self._config.enable_chunked_prefill
            if is_too_long or num_needed + num_reserved > self._cache.num_available:
                self._cache.release(request)
                return
            self._enter_row(self._queue.pop(), now_s)
            num_reserved += 1
            if request.recv_kv_from is not None:
                self._cache.extend(request, num_needed)
                self._transfers.expect(request)
                continue
            request.state = RequestState.RUNNING
            self._prefilling[request.request_id] = request
            self._introduce(request, batch)
            self._add_chunk(batch, request)
            num_reserved += request.num_remaining_tokens

    def _enter_row(self, request: Request, now_s: float) -> None:
        """Give an acquired request a row, which the worker need not know yet."""
        request.admit_until_s = math.inf
        request.note("prefill_start" if request.recv_kv_from is None else "kv_reserved", now_s)
        self._rows.enter(request)
        if not request.num_preemptions:
            request.queue_s = max(0.0, now_s - request.arrival_s)
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self._counters.note_admission(request)

    def _emit(self, columns: BatchColumns, phase: str) -> ScheduledBatch:
        freed_rows = self._rows.take_freed(columns.new_requests)
        batch = columns.finish(next(self._step_ids), freed_rows, self._transfers.take_orders())
        self._steps.append(Step(batch, columns.requests, phase))
        return batch

    # ------------------------------------------------------------ leaving

    def _finish(self, request: Request) -> None:
        """Forget a live request; its row is free for the next step, and so are its slots.

        Slots that a transport may touch are an exception: they are free once it has let go of them.
        """
        self._leave(request)
        if request.request_id in self._transfers.live:
            self._transfers.cancel(request)
        elif request.state is not RequestState.WAITING:
            self._cache.release(request)
        request.state = RequestState.FINISHED
        self._past.add(request, self._now_s)
        del self._requests[request.request_id]
        self._release_siblings(request)

    def _leave(self, request: Request) -> None:
        """Take a request out of its list and its row, whichever it is in."""
        self._prefilling.pop(request.request_id, None)
        self._decoding.pop(request.request_id, None)
        self._transfers.leave(request)
        self._rows.leave(request)

    def _go_on_elsewhere(self, request: Request) -> None:
        """A request's last token in flight has come, and it does not decode here."""
        if request.state is RequestState.SENDING_KV:
            self._rows.leave(request)
        else:
            self._queue.push(request)  # preempted while this token was in flight

    def _take_transfers(self, output: StepOutput) -> list[RequestOutput]:
        """Take over which transfers have ended, after the tokens of the same step."""
        outputs = []
        for request, ending in self._transfers.end(output, self._now_s):
            if request.state is RequestState.FINISHED:
                self._cache.release(request)  # it ended before, and its slots are free only now
            elif isinstance(ending, KVArrival):
                outputs += self._begin_decoding(request, ending.first_token_id)
            else:
                self._finish(request)
                outputs.append(request.transfer_output(ending))
        return outputs

    def _begin_decoding(self, request: Request, first_token_id: int) -> list[RequestOutput]:
        """Go on behind a first token that the sender has made and its client has got from there."""
        request.state = RequestState.RUNNING
        request.recv_kv_from = None
        request.num_computed_tokens = request.num_unsent_slots = len(request.slots)
        self._cache.share(request)
        request.token_ids.append(first_token_id)
        self._decoding[request.request_id] = request
        self._received.append(request)
        self._release_siblings(request)
        reason = request.finish_reason()
        if reason is None:
            return []
        self._finish(request)
        return [request.final_output(reason)]

    def _release_siblings(self, request: Request) -> None:
        for sibling in self._queue.take_held(request):
            self._enqueue(sibling)

    # ------------------------------------------------------------ looking

    def take_reservations(self) -> list[KVReserved]:
        """Of which requests the masters must hear that KV may come, once the batch is submitted."""
        return self._transfers.take_reservations()

    @property
    def _num_waiting(self) -> int:
        return len(self._requests) - self._num_running

    @property
    def _num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding) + self._transfers.num_waiting

    def _running(self) -> Iterator[Request]:
        yield from self._prefilling.values()
        yield from self._decoding.values()

    def inspect(self, request_ids: list[str]) -> list[RequestView]:
        """What is known of these requests; those that were never here, or long ago, are left out."""
        return self._past.views(request_ids, self._requests)

    def stats(self) -> EngineStats:
        """Numbers for metrics and routing; O(1)."""
        return EngineStats(
            requests_running=self._num_running,
            requests_waiting=self._num_waiting,
            kv_used_tokens=self._config.num_slots - self._cache.num_available,
            kv_cached_tokens=self._cache.num_evictable,
            kv_total_tokens=self._config.num_slots,
            kv_committed_tokens=self._rows.num_committed_tokens,
            **self._counters.fields(),
        )

    def check_integrity(self) -> None:
        """Check slots, locks, rows and states against each other: an AssertionError has the numbers."""
        self._transfers.check_integrity()
        holders = {r.request_id: r for r in (*self._running(), *self._transfers.live.values())}
        self._cache.check_integrity(holders.values())
        self._rows.check_integrity(holders.values())
        for request in self._requests.values():
            is_prefilling, is_decoding = (request.request_id in d for d in (self._prefilling, self._decoding))
            request.check_integrity(is_prefilling=is_prefilling, is_decoding=is_decoding)
