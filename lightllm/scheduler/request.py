"""Request: what the scheduler knows of one request, from arrival to its last output.

Mutable and private to the scheduler: other processes see EngineRequest, NewRequest and RequestOutput. Holds
the numbers and answers questions about them; decisions are made in scheduler.py, slots are moved in cache.py.
"""

from __future__ import annotations

import math
from array import array
from enum import Enum, auto
from typing import TYPE_CHECKING

import msgspec

from lightllm.messages import (
    EngineRequest,
    KVFailure,
    KVSource,
    KVTarget,
    NewRequest,
    RequestFailure,
    RequestOutput,
    TokenLogprobs,
)
from lightllm.scheduler.radix_tree import Node

if TYPE_CHECKING:
    from lightllm.scheduler.drafting import Drafting

MAX_EVENTS = 32


class RequestState(Enum):
    """Where a request is in its life.

    WAITING -> RUNNING -> FINISHED, and back to WAITING when preempted; RECEIVING_KV comes before RUNNING and
    SENDING_KV after it where KV moves between nodes. One that sends is RUNNING while it computes its prompt,
    though parts of it leave already, and is never preempted.
    """

    WAITING = auto()
    RUNNING = auto()
    RECEIVING_KV = auto()
    SENDING_KV = auto()
    FINISHED = auto()


class Request:
    """One request. `token_ids` are its prompt and all output tokens known so far.

    Who owns which positions of its KV (`slots[p]` is the slot of position p):

        [0, num_tree_tokens)             the radix tree; locked for this request through `tree_node`
        [num_tree_tokens, len(slots))    this request alone

    and who knows what of its tokens:

        [len(slots) - num_unsent_slots, len(slots))
                                         slots that the worker does not have in its table, or not any more:
                                         they go out with the next batch
        [0, num_computed_tokens)         KV valid for every later step, because steps are executed in order;
                                         num_computed_tokens == len(slots)
        [num_computed_tokens, len(slots))
                                         only in RECEIVING_KV: filled by the transport
        [num_computed_tokens, len(token_ids))
                                         known, still to be computed
        [len(token_ids), len(token_ids) + num_in_flight)
                                         sampled by steps whose results are not here yet; the next decode
                                         step reads them on the device. Drafts count here too, until their
                                         step's result says how many of them stay

    Attributes:
        rank: order of preemption and of running prefills; smaller is more urgent (see policy.py).
        num_cached_tokens: prompt tokens found in the prefix cache at the first admission.
        queue_s: seconds from arrival to the first admission.
        min_num_tokens: length from which an end token ends the request.
        max_num_tokens: length at which it ends in any case. The last token's KV is never needed.
        drafting: how its tokens are drafted; None until they are.
        prompt_logprobs: by position; None where not asked for, or delivered already.
        is_in_row: whether the worker knows that the request is in `row`.
        send_kv_to: where its KV goes; num_ordered_tokens of it are ordered.
        recv_kv_from: from where its KV comes; None again once it is there.
        lease_until_s, admit_until_s: when it ends if it is not renewed, or not admitted.
        events: what happened to it, and when (Unix seconds).
    """

    __slots__ = (
        "admit_until_s",
        "arrival_s",
        "deadline_s",
        "drafting",
        "end_token_ids",
        "events",
        "is_in_row",
        "lease_until_s",
        "max_num_tokens",
        "min_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_ordered_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_tree_tokens",
        "num_unsent_slots",
        "priority",
        "prompt_logprobs",
        "queue_s",
        "rank",
        "recv_kv_from",
        "request_id",
        "row",
        "sample_index",
        "sampling_params",
        "seed",
        "send_kv_to",
        "slots",
        "state",
        "token_ids",
        "tree_node",
    )

    def __init__(
        self, message: EngineRequest, *, arrival_s: float, seed: int, end_token_ids: frozenset[int]
    ) -> None:
        params = message.sampling_params
        self.request_id = message.request_id
        self.sampling_params = params
        self.sample_index = message.sample_index
        self.seed = seed
        self.end_token_ids = end_token_ids
        self.priority = message.priority
        self.arrival_s = arrival_s
        self.deadline_s = math.inf if message.deadline_s is None else message.deadline_s
        self.rank = (arrival_s, 0)

        self.token_ids = array("i", message.prompt_token_ids)  # a copy, which grows
        self.token_ids.extend(message.output_token_ids)
        self.num_prompt_tokens = len(message.prompt_token_ids)
        self.min_num_tokens = self.num_prompt_tokens + params.min_new_tokens
        self.max_num_tokens = self.num_prompt_tokens + params.max_new_tokens
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        is_first_to_compute = not message.output_token_ids and message.recv_kv_from is None
        if params.prompt_logprobs is not None and is_first_to_compute:
            self.prompt_logprobs = [None] * self.num_prompt_tokens

        self.send_kv_to: KVTarget | None = message.send_kv_to
        self.recv_kv_from: KVSource | None = message.recv_kv_from
        self.num_ordered_tokens = 0
        self.lease_until_s = math.inf
        self.admit_until_s = math.inf

        self.state = RequestState.WAITING
        self.row = -1
        self.is_in_row = False
        self.slots = array("i")
        self.tree_node: Node | None = None
        self.num_tree_tokens = 0
        self.num_unsent_slots = 0
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.num_cached_tokens = 0
        self.queue_s = 0.0
        self.num_preemptions = 0
        self.drafting: Drafting | None = None
        self.events: list[tuple[str, float]] = []

    def note(self, event: str, now_s: float) -> None:
        """Remember when something happened to it; of very many events the first and the latest ones."""
        if len(self.events) == MAX_EVENTS:
            del self.events[1]
        self.events.append((event, now_s))

    @property
    def num_remaining_tokens(self) -> int:
        """Known tokens that are still to be computed."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_prompt_computed(self) -> bool:
        """Whether later steps may use the KV of the whole prompt."""
        return self.num_computed_tokens >= self.num_prompt_tokens

    @property
    def expiry_s(self) -> float:
        """When the request ends by itself if nothing happens."""
        return min(self.deadline_s, self.lease_until_s, self.admit_until_s)

    @property
    def max_cached_tokens(self) -> int:
        """How many tokens may come from the prefix cache.

        One at least must be computed, to sample behind it; all of them for logprobs of the prompt.
        """
        return len(self.token_ids) - 1 if self.prompt_logprobs is None else 0

    def finish_reason(self) -> str | None:
        """Why the last token, an output, ends the request; None if it does not."""
        num_tokens = len(self.token_ids)
        if num_tokens >= self.min_num_tokens and self.token_ids[-1] in self.end_token_ids:
            return "stop"
        return "length" if num_tokens >= self.max_num_tokens else None

    def add_prompt_logprobs(self, start: int, entries: list[TokenLogprobs]) -> None:
        """Take over what a step that began at position `start` says of the prompt tokens behind it."""
        if self.prompt_logprobs is not None:
            self.prompt_logprobs[start + 1 : start + 1 + len(entries)] = entries

    def take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """The prompt's logprobs, once, if asked for."""
        entries, self.prompt_logprobs = self.prompt_logprobs, None
        return entries

    def start_message(self, eos_token_ids: list[int]) -> NewRequest:
        """What the worker needs to know when the request enters a row."""
        return NewRequest(
            request_id=self.request_id,
            row=self.row,
            token_ids=self.token_ids[:],
            num_prompt_tokens=self.num_prompt_tokens,
            sampling_params=self.sampling_params,
            eos_token_ids=eos_token_ids,
            seed=self.seed,
            sample_index=self.sample_index,
        )

    def token_output(self, new_token_ids: list[int], logprobs: list[TokenLogprobs] | None) -> RequestOutput:
        """What a step brought, whose tokens are known by now; the last output if they end the request.

        There may be more logprobs than tokens. Made once per request and step: most of them are short.
        """
        num_tokens = len(self.token_ids)
        is_first = num_tokens - len(new_token_ids) <= self.num_prompt_tokens
        may_end = num_tokens >= self.max_num_tokens or self.token_ids[-1] in self.end_token_ids
        if not (is_first or may_end or logprobs):
            return RequestOutput(request_id=self.request_id, new_token_ids=new_token_ids)
        return RequestOutput(
            request_id=self.request_id,
            new_token_ids=new_token_ids,
            logprobs=logprobs and logprobs[: len(new_token_ids)],
            prompt_logprobs=self.take_prompt_logprobs() if self.prompt_logprobs else None,
            finish_reason=self.finish_reason() if may_end else None,
            num_cached_tokens=self.num_cached_tokens,
            queue_s=self.queue_s,
        )

    def continuation(self) -> EngineRequest:
        """The rest of this request as a new one, whose tokens will be those that this one would have had."""
        return EngineRequest(
            request_id=self.request_id,
            prompt_token_ids=self.token_ids[: self.num_prompt_tokens],
            output_token_ids=self.token_ids[self.num_prompt_tokens :].tolist(),
            sampling_params=msgspec.structs.replace(self.sampling_params, seed=self.seed),
            sample_index=self.sample_index,
            priority=self.priority,
            arrival_s=self.arrival_s,
            deadline_s=None if self.deadline_s == math.inf else self.deadline_s,
            send_kv_to=self.send_kv_to,
            recv_kv_from=self.recv_kv_from,
        )

    def transfer_output(self, failure: KVFailure | None) -> RequestOutput:
        """The last output of a request that ends with its transfer."""
        if failure is None:
            return self.final_output("handed_over")
        error = RequestFailure(code="kv_transfer_failed", message=failure.reason)
        return self.final_output("error", error)

    def final_output(self, reason: str, error: RequestFailure | None = None) -> RequestOutput:
        """The last output, when the end comes from elsewhere than a sampled token."""
        return RequestOutput(
            request_id=self.request_id,
            finish_reason=reason,
            error=error,
            num_cached_tokens=self.num_cached_tokens,
        )

    def check_integrity(self, *, is_prefilling: bool, is_decoding: bool) -> None:
        """Check the numbers of a live request against each other and against the list that it is in."""
        name, num_slots, num_computed = self.request_id, len(self.slots), self.num_computed_tokens
        state, num_known = self.state, len(self.token_ids)
        num_valid = num_slots if state is not RequestState.RECEIVING_KV else self.num_tree_tokens
        assert num_computed == num_valid, f"{name}: {num_computed} computed tokens in {num_slots} slots"
        assert 0 <= self.num_tree_tokens <= num_slots, f"{name}: {self.num_tree_tokens} tokens in the tree"
        assert 0 <= self.num_unsent_slots <= num_slots, f"{name}: {self.num_unsent_slots} slots are unsent"
        is_running = state is RequestState.RUNNING
        assert is_running == (is_prefilling != is_decoding), f"{name} is {state}, but in another list"
        assert state is not RequestState.FINISHED, f"{name} is alive and {state}"
        if is_prefilling:
            assert self.num_remaining_tokens > 0, f"{name} has nothing to prefill"
            assert not self.num_in_flight, f"{name} prefills behind {self.num_in_flight} tokens in flight"
        elif is_decoding:
            num_left = self.num_remaining_tokens + self.num_in_flight
            assert num_left == 1, f"{name} decodes with {num_left} tokens left"
        elif state is RequestState.RECEIVING_KV:
            assert num_slots == num_known, f"{name} receives {num_known} tokens into {num_slots} slots"
        elif state is RequestState.SENDING_KV:
            num_ordered = self.num_ordered_tokens
            assert num_ordered == num_slots, f"{name} sends {num_ordered} tokens from {num_slots} slots"
        else:
            assert not num_slots, f"{name} waits with {num_slots} slots"
