"""Scheduler: the one owner of all requests; decides what each step computes.

    add() -> schedule() -> [executor] -> update() -> outputs

A step is one number per request: how many of its tokens are computed now. Steps are executed strictly in the
order of schedule(), and update() may lag behind by any number of them; therefore whatever a scheduled step
writes counts as there for every later one, and slots or rows that are given up can be handed out at once.
Knows no torch, no threads and no clock (times are arguments, Unix seconds). Runs in the engine process.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

from lightllm.messages import (
    EngineRequest,
    EngineStats,
    RequestFailure,
    RequestOutput,
    ScheduledBatch,
    StepOutput,
)
from lightllm.scheduler.batch import BatchColumns
from lightllm.scheduler.cache import NullPrefixCache, PrefixCache
from lightllm.scheduler.config import SchedulerConfig, check_config
from lightllm.scheduler.drafting import Drafter
from lightllm.scheduler.policy import POLICIES, WaitingQueue, urgency
from lightllm.scheduler.request import Request, RequestState

_RANK = attrgetter("rank")


class Step(NamedTuple):
    """A scheduled step whose result is not here yet; `requests` are aligned with the batch's columns."""

    batch: ScheduledBatch
    requests: list[Request]
    phase: str


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
        self._max_total_len = min(config.max_req_total_len, config.num_slots)
        self._max_chunk = (
            config.chunked_prefill_size if config.enable_chunked_prefill else config.batch_max_tokens
        )
        self._drafter = Drafter(config.draft_ngram) if config.draft_ngram else None
        self._seeds = random.Random(seed)
        self._eos_token_ids = frozenset(config.eos_token_ids)

        # All live requests by id. A running one is in exactly one of the next two: _prefilling has known
        # tokens to compute; _decoding has one more, whose value may still be in flight.
        self._requests: dict[str, Request] = {}
        self._prefilling: dict[str, Request] = {}
        self._decoding: dict[str, Request] = {}
        # Siblings that wait for the prompt of the request with this id.
        self._siblings: dict[str, list[Request]] = {}
        # Each running request can compute at least one token in every step, so that none starves in its row.
        self._max_rows = min(config.max_running, config.batch_max_tokens)
        self._free_rows = list(range(self._max_rows))
        self._rows_to_announce: set[int] = set()
        self._steps: deque[Step] = deque()
        # A lower bound: no live request's deadline is earlier.
        self._next_deadline_s = math.inf

        self._num_added = 0
        self._num_scheduled_steps = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0
        self._num_steps = 0
        self._num_committed_tokens = 0
        self._last_step = (0.0, 0, 0, "idle")

    # ------------------------------------------------------------ the outside: requests come and go

    @property
    def has_work(self) -> bool:
        """Whether any request is alive or any step's result is to come."""
        return bool(self._requests or self._steps)

    @property
    def num_in_flight_steps(self) -> int:
        """Steps scheduled whose results are not here yet."""
        return len(self._steps)

    def request_ids(self) -> list[str]:
        """All live requests."""
        return list(self._requests)

    def add(self, message: EngineRequest, now_s: float) -> RequestOutput | None:
        """Accept a request; it will end in exactly one output with a finish_reason.

        Returns:
            That output at once if the request is refused, or has nothing left to generate; else None.
        """
        failure = self._refusal(message)
        if failure is not None:
            return RequestOutput(request_id=message.request_id, finish_reason="error", error=failure)
        request = self._make_request(message, now_s)
        reason = request.finish_reason() if message.output_token_ids else None
        if reason is not None:
            return request.final_output(reason)
        self._requests[request.request_id] = request
        self._next_deadline_s = min(self._next_deadline_s, request.deadline_s)
        leader = self._requests.get(message.after_request_id or "")
        if leader is None or leader.is_prompt_computed:
            self._queue.push(request)
        else:
            self._siblings.setdefault(leader.request_id, []).append(request)
        return None

    def abort(self, request_id: str, reason: str) -> RequestOutput | None:
        """End a request at once; tokens that are in flight for it are dropped.

        Returns:
            Its final output with `reason` as finish_reason; None if there is no such request.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._finish(request)
        return request.final_output(reason)

    def expire(self, now_s: float) -> list[RequestOutput]:
        """End all requests whose deadline has passed; costs nothing while there are none."""
        if now_s < self._next_deadline_s:
            return []
        outputs = []
        for request in [r for r in self._requests.values() if r.deadline_s <= now_s]:
            text = (
                f"the deadline passed {now_s - request.arrival_s:.1f} s after arrival with "
                f"{request.num_output_tokens} of at most {request.sampling_params.max_new_tokens} tokens "
                "made; allow more time or ask for fewer tokens"
            )
            self._finish(request)
            outputs.append(request.final_output("error", RequestFailure(code="deadline", message=text)))
        self._next_deadline_s = min((r.deadline_s for r in self._requests.values()), default=math.inf)
        return outputs

    # ------------------------------------------------------------ one step: out and back

    def schedule(self, now_s: float) -> ScheduledBatch | None:
        """Compose the next step: all decodes, then chunks of running prefills, then new requests.

        Requests past their deadline are not admitted any more; `expire` ends them.

        Returns:
            The batch, which must be executed in this order; None if there is nothing to compute now.
        """
        batch = BatchColumns(self._config.batch_max_tokens)
        num_preemptions = self._num_preemptions
        decodes, drafts = self._preempt_if_full(), list[int]()
        if self._drafter is not None:
            room = min(self._max_chunk, batch.num_tokens_left, self._cache.num_available) - 1
            is_alone = len(self._requests) == 1
            decodes, drafts = self._drafter.choose(decodes, is_alone=is_alone, room=room)
        self._add_decodes(batch, decodes, drafts)
        for request in sorted(self._prefilling.values(), key=_RANK):
            self._add_chunk(batch, request)
        if self._num_preemptions == num_preemptions:
            self._admit(batch, now_s)
        if not batch.requests:
            return None
        prefills = batch.requests[len(decodes) :]
        for request in prefills:
            self._cache.share(request)
            if request.is_prompt_computed:
                self._release_siblings(request)
        return self._emit(batch, "decode" if not prefills else "mixed" if decodes else "prefill")

    def update(self, output: StepOutput) -> list[RequestOutput]:
        """Take over the result of the oldest scheduled step.

        Returns:
            One output for each request that got a token; tokens of requests that have ended are dropped.
        """
        batch, requests, phase = self._steps.popleft()
        assert output.step_id == batch.step_id, f"result of step {output.step_id}, expected {batch.step_id}"
        self._num_steps += 1
        self._last_step = (output.duration_s, len(requests), sum(batch.num_new_tokens), phase)
        if self._drafter is not None:
            self._drafter.note(output, self._last_step[2])
        for index, entries in output.prompt_logprobs.items():
            requests[index].add_prompt_logprobs(batch.starts[index], entries)
        finished, waiting = RequestState.FINISHED, RequestState.WAITING
        logprobs = output.logprobs
        outputs: list[RequestOutput] = []
        for index, (request, is_sampling, new_token_ids) in enumerate(
            zip(requests, batch.is_sampling, output.token_ids, strict=True)
        ):
            if not is_sampling or request.state is finished:
                continue
            if index in batch.drafts:
                new_token_ids = self._settle_drafts(request, new_token_ids, output.duration_s)
            else:
                (token_id,) = new_token_ids
                request.token_ids.append(token_id)
                request.num_in_flight -= 1
            self._num_generated_tokens += len(new_token_ids)
            reason = request.finish_reason()
            outputs.append(
                RequestOutput(
                    request_id=request.request_id,
                    new_token_ids=new_token_ids,
                    logprobs=logprobs[index][: len(new_token_ids)] if index in logprobs else None,
                    prompt_logprobs=request.take_prompt_logprobs() if request.prompt_logprobs else None,
                    finish_reason=reason,
                    num_cached_tokens=request.num_cached_tokens,
                    queue_s=request.queue_s,
                )
            )
            if reason is not None:
                self._finish(request)
            elif request.state is waiting and not request.num_in_flight:
                self._queue.push(request)  # preempted while this token was in flight
        return outputs

    def _settle_drafts(self, request: Request, token_ids: list[int], duration_s: float) -> list[int]:
        """Take what a step with drafts brought; returns the tokens that the request has taken."""
        assert self._drafter is not None
        taken = self._drafter.settle(request, token_ids, duration_s)
        if request.state is RequestState.RUNNING:
            # Behind the last token whose successor is known nothing is computed as it should be.
            surplus = request.num_computed_tokens - len(request.token_ids) + 1
            self._cache.shrink(request, surplus)
            request.num_computed_tokens -= surplus
        return taken

    # ------------------------------------------------------------ adding

    def _refusal(self, message: EngineRequest) -> RequestFailure | None:
        """Why a request cannot be accepted; None if it can."""
        num_prompt, num_new = len(message.prompt_token_ids), message.sampling_params.max_new_tokens
        max_waiting = self._config.max_queued_requests + len(self._free_rows)
        if message.request_id in self._requests:
            return RequestFailure(
                code="internal", message=f"request id {message.request_id} is in use already"
            )
        if message.grammar or message.send_kv_to or message.recv_kv_from:
            text = "constrained output and KV transfer are not implemented in this version"
            return RequestFailure(code="not_supported", message=text)
        if not message.prompt_token_ids:
            return RequestFailure(code="out_of_range", message="the prompt is empty; send at least one token")
        if num_prompt + num_new > self._max_total_len:
            text = (
                f"prompt has {num_prompt} tokens and max_new_tokens is {num_new}, together "
                f"{num_prompt + num_new}; the limit is {self._max_total_len}; shorten the prompt or lower "
                "max_new_tokens"
            )
            return RequestFailure(code="context_length_exceeded", message=text)
        if self._num_waiting >= max_waiting:
            text = (
                f"{self._num_waiting} requests are waiting already, the limit is {max_waiting}; "
                "try again later or raise --max_queued_requests"
            )
            return RequestFailure(code="queue_full", message=text)
        return None

    def _make_request(self, message: EngineRequest, now_s: float) -> Request:
        params = message.sampling_params
        end_token_ids = frozenset() if params.ignore_eos else self._eos_token_ids
        if params.stop_token_ids:
            end_token_ids = end_token_ids.union(params.stop_token_ids)
        request = Request(
            message,
            # A clock that is ahead somewhere else must not push a request to the end of the queue.
            arrival_s=min(message.arrival_s, now_s) if message.arrival_s else now_s,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            end_token_ids=end_token_ids,
        )
        self._num_added += 1
        request.rank = (urgency(request), self._num_added)
        return request

    # ------------------------------------------------------------ composing a step

    def _preempt_if_full(self) -> list[Request]:
        """Make sure that every running request can get a slot now, at the cost of the least urgent ones.

        The most urgent one is never preempted, so it finishes, then the next one: there is always progress.

        Returns:
            The decodes that can go on; the others wait for their last token.
        """
        while True:
            # A decode that computes position p samples the token at p + 1.
            ready = [r for r in self._decoding.values() if r.num_computed_tokens + 1 < r.max_num_tokens]
            if len(ready) + len(self._prefilling) <= self._cache.num_available:
                return ready
            self._preempt(max(self._running(), key=_RANK))

    def _preempt(self, request: Request) -> None:
        """Put a running request back into the queue; what it has computed stays cached if there is room."""
        self._vacate(request)
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        self._num_preemptions += 1
        if not request.num_in_flight:
            self._queue.push(request)  # else update() does

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
        count = min(num_remaining, self._max_chunk, batch.num_tokens_left, self._cache.num_available)
        if not count:
            return
        self._cache.extend(request, count)
        batch.add_chunk(request, count, is_sampling=count == num_remaining)
        request.num_computed_tokens += count
        if count == num_remaining:
            request.num_in_flight += 1
            del self._prefilling[request.request_id]
            self._decoding[request.request_id] = request

    def _admit(self, batch: BatchColumns, now_s: float) -> None:
        """Start waiting requests, in order, while the step and the pool have room.

        There must be slots for all of a request's known tokens, not for its next chunk only, beside those
        that running prefills still need and one for each running request: a prompt begun can be ended.
        """
        num_reserved = len(self._decoding) + len(self._prefilling)
        num_reserved += sum(request.num_remaining_tokens for request in self._prefilling.values())
        while batch.num_tokens_left and self._free_rows and self._cache.num_available > num_reserved:
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
            self._start(self._queue.pop(), batch, now_s)
            self._add_chunk(batch, request)
            num_reserved += request.num_remaining_tokens + 1

    def _start(self, request: Request, batch: BatchColumns, now_s: float) -> None:
        """Give an acquired request a row."""
        request.state = RequestState.RUNNING
        request.row = heapq.heappop(self._free_rows)
        self._prefilling[request.request_id] = request
        self._num_committed_tokens += request.max_num_tokens
        if not request.num_preemptions:
            request.queue_s = max(0.0, now_s - request.arrival_s)
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self._num_cached_tokens += request.num_cached_tokens
            self._num_prompt_tokens += request.num_prompt_tokens
        batch.new_requests.append(request.start_message(self._config.eos_token_ids))

    def _emit(self, columns: BatchColumns, phase: str) -> ScheduledBatch:
        self._rows_to_announce.difference_update(new.row for new in columns.new_requests)
        batch = columns.finish(self._num_scheduled_steps, sorted(self._rows_to_announce))
        self._rows_to_announce.clear()
        self._num_scheduled_steps += 1
        self._steps.append(Step(batch, columns.requests, phase))
        return batch

    # ------------------------------------------------------------ leaving

    def _finish(self, request: Request) -> None:
        """Forget a live request; its row and slots are free for the next step."""
        if request.state is RequestState.RUNNING:
            self._vacate(request)
        request.state = RequestState.FINISHED
        del self._requests[request.request_id]
        self._release_siblings(request)

    def _vacate(self, request: Request) -> None:
        """Take row and slots of a running request."""
        self._cache.release(request)
        self._prefilling.pop(request.request_id, None)
        self._decoding.pop(request.request_id, None)
        self._num_committed_tokens -= request.max_num_tokens
        self._rows_to_announce.add(request.row)
        heapq.heappush(self._free_rows, request.row)

    def _release_siblings(self, request: Request) -> None:
        """Let those queue up who waited for the prompt of this request."""
        for sibling in self._siblings.pop(request.request_id, ()):
            self._queue.push(sibling)

    # ------------------------------------------------------------ looking

    @property
    def _num_waiting(self) -> int:
        return len(self._requests) - len(self._prefilling) - len(self._decoding)

    def _running(self) -> Iterator[Request]:
        yield from self._prefilling.values()
        yield from self._decoding.values()

    def stats(self) -> EngineStats:
        """Numbers for metrics and routing; O(1)."""
        duration_s, batch_size, num_tokens, phase = self._last_step
        num_available, num_evictable = self._cache.num_available, self._cache.num_evictable
        return EngineStats(
            requests_running=len(self._prefilling) + len(self._decoding),
            requests_waiting=self._num_waiting,
            kv_used_tokens=self._config.num_slots - num_available,
            kv_cached_tokens=num_evictable,
            kv_total_tokens=self._config.num_slots,
            kv_committed_tokens=self._num_committed_tokens,
            preemptions_total=self._num_preemptions,
            prompt_tokens_total=self._num_prompt_tokens,
            cached_tokens_total=self._num_cached_tokens,
            generated_tokens_total=self._num_generated_tokens,
            steps_total=self._num_steps,
            step_duration_s=duration_s,
            step_batch_size=batch_size,
            step_num_tokens=num_tokens,
            step_phase=phase,
        )

    def check_integrity(self) -> None:
        """Check slots, locks, rows and states against each other; for tests and idle moments.

        Raises:
            AssertionError: with the numbers that differ.
        """
        running = list(self._running())
        self._cache.check_integrity(running)
        rows = sorted([*self._free_rows, *(request.row for request in running)])
        assert rows == list(range(self._max_rows)), (
            f"rows free or used are {rows}, expected 0..{self._max_rows - 1}"
        )
        committed = sum(request.max_num_tokens for request in running)
        counter = self._num_committed_tokens
        assert committed == counter, f"{committed} tokens are committed, counter says {counter}"
        for request in self._requests.values():
            is_prefilling, is_decoding = (request.request_id in d for d in (self._prefilling, self._decoding))
            request.check_integrity(is_prefilling=is_prefilling, is_decoding=is_decoding)
