"""The loop of the system: requests in, one scheduled step after the other, outputs out.

Runs in the engine process. Owns the order of things and nothing else: requests and slots belong to the
scheduler, tensors to the executor's workers, bytes to the link. Knows no torch, no HTTP and no tokenizer.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from lightllm.engine.executor import Executor, Pending
from lightllm.engine.recovery import Recovery, StepFailed, result_of
from lightllm.messages import (
    AbortAll,
    AbortRequest,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FromEngine,
    Inspect,
    Inspected,
    KVTransfer,
    Ping,
    Pong,
    RenewLeases,
    RequestOutput,
    ToEngine,
)
from lightllm.packed_ints import pack
from lightllm.sampling_params import SamplingParams
from lightllm.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0
TRANSFER_WAIT_S = 0.002
"""With nothing to compute but KV on its way, ranks in other processes are asked so often how far it is."""
WATCHED_WAIT_S = 0.1
"""The same where the end of a transfer wakes the loop."""


class Link(Protocol):
    """The engine's end of the connection to its frontends."""

    def receive(self, timeout_s: float) -> list[ToEngine]:
        """Take all messages that have arrived; wait for the first at most `timeout_s` (0: do not wait)."""
        ...

    def send(self, message: FromEngine) -> None:
        """Hand one message over; never blocks on a slow or absent reader."""
        ...

    def wake(self) -> None:
        """End a `receive` that waits, or else the next one that would; any thread may call this."""
        ...


class Engine:
    """Scheduler + executor, joined by `step()`.

    Args:
        scheduler: owns all requests.
        executor: computes scheduled batches, in the order in which they are submitted.
        link: where requests come from and outputs go to.
        enable_overlap: schedule step N+1 before the result of step N is taken. Off, each result is taken at
            once; tokens are the same either way.
        on_stats: called with the scheduler's state after each message that is sent.
        clock: Unix seconds.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        link: Link,
        *,
        enable_overlap: bool = True,
        on_stats: Callable[[EngineStats], None] = lambda stats: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.link = link
        self.on_stats = on_stats
        self.clock = clock
        self.max_pending = 1 if enable_overlap else 0
        self.transfer_wait_s = WATCHED_WAIT_S if executor.watch(link.wake) else TRANSFER_WAIT_S
        self.recovery = Recovery(executor, clock)
        self.pending: deque[Pending] = deque()
        self.steps_total = 0
        self._ended_transfers: list[KVTransfer] = []
        self._is_room_new = False

    def step(self) -> None:
        """Run one turn of the loop; waits for messages only when there is nothing to compute."""
        outputs = self._take_messages()
        outputs += self.scheduler.expire(self.clock())
        batch = self.scheduler.schedule(self.clock())
        self._is_room_new = False
        if batch is not None:
            self.pending.append(self.executor.submit(batch))
        for reserved in self.scheduler.take_reservations():
            self.link.send(reserved)
        num_steps = self.steps_total
        if len(self.pending) > (self.max_pending if batch is not None and batch.rows else 0):
            outputs += self._take_result()
        # What has ended waits for the next message where there is one to come: a step is more urgent.
        if outputs or self.steps_total > num_steps or (self._ended_transfers and self._wait_s()):
            stats = self.scheduler.stats()
            ended, self._ended_transfers = self._ended_transfers, []
            self.link.send(EngineOutput(outputs=outputs, stats=stats, kv_transfers=ended))
            self.on_stats(stats)

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Step until `should_stop()`; what is nobody's fault ends the loop and the process with it."""
        while not should_stop():
            self.step()

    def warm_up(self, prompt_token_ids: list[int], num_tokens: int = 2) -> list[int]:
        """Compute real tokens before the first request, so that ready means ready.

        Returns:
            The greedy continuation of the prompt.
        """
        params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        request = EngineRequest(
            request_id="warm_up", prompt_token_ids=pack(prompt_token_ids), sampling_params=params
        )
        token_ids: list[int] = []
        outputs = _listed(self.scheduler.add(request, self.clock()))
        while True:
            for output in outputs:
                token_ids += output.new_token_ids
                if output.finish_reason == "error" and output.error is not None:
                    raise RuntimeError(f"the warm-up request failed: {output.error.message}")
                if output.finish_reason is not None:
                    self._finish_steps_in_flight()
                    return token_ids
            batch = self.scheduler.schedule(self.clock())
            if batch is not None:
                self.pending.append(self.executor.submit(batch))
            outputs = self._take_result()

    def _take_messages(self) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        for message in self.link.receive(self._wait_s()):
            match message:
                case EngineRequest():
                    outputs += _listed(self.scheduler.add(message, self.clock()))
                case AbortRequest(request_id=request_id, reason=reason):
                    outputs += _listed(self.scheduler.abort(request_id, reason))
                case AbortAll():
                    for request_id in list(self.scheduler.requests):
                        self.scheduler.abort(request_id, "abort")
                case RenewLeases(request_ids=request_ids):
                    self.scheduler.renew(request_ids, self.clock())
                case Inspect(nonce=nonce, request_ids=request_ids):
                    self.link.send(Inspected(nonce=nonce, views=self.scheduler.inspect(request_ids)))
                case Ping(nonce=nonce):
                    self.link.send(Pong(nonce=nonce, stats=self.scheduler.stats()))
        return outputs

    def _wait_s(self) -> float:
        """How long the next turn may wait for a message."""
        if self.pending or self._is_room_new:
            return 0.0
        if not self.scheduler.has_work:
            return IDLE_WAIT_S
        return self.transfer_wait_s if self.scheduler.is_only_transferring else 0.0

    def _take_result(self) -> list[RequestOutput]:
        try:
            result = result_of(self.pending.popleft())
        except StepFailed as failure:
            return self._recover(failure)
        self.steps_total += bool(result.token_ids)  # a batch without rows is no step
        self._ended_transfers += result.kv_transfers
        self._is_room_new = bool(result.kv_transfers)  # for those that wait for slots
        return self.scheduler.update(result)

    def _recover(self, failure: StepFailed) -> list[RequestOutput]:
        """Go on without the request whose step failed; see recovery.py."""
        while self.pending:
            with contextlib.suppress(StepFailed):
                result_of(self.pending.popleft())
        recovered = self.recovery.run(self.scheduler, failure, self.steps_total)
        self.scheduler = recovered.scheduler
        self._ended_transfers += recovered.kv_transfers
        return recovered.outputs

    def _finish_steps_in_flight(self) -> None:
        while self.pending:
            self._take_result()


def _listed(output: RequestOutput | None) -> list[RequestOutput]:
    return [] if output is None else [output]
