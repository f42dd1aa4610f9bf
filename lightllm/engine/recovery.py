"""After a step that raised: find the request at fault, end it, and let all others go on.

What a failed step has written, and what later ones built on it, counts as lost. So every live request goes on
as it would on another node, as a new request with the tokens that it has. Those of the failed step are first
tried one by one; one whose step raises again, alone, ends in an error. KV that moves between nodes lies in
slots that are lost, too: transfers end here, and their requests are computed where they are to be decoded, by
the ordinary way of a transfer that failed. Runs in the engine process.
"""

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from lightllm.engine.executor import Executor, Pending
from lightllm.errors import LightLLMError
from lightllm.messages import (
    EngineRequest,
    KVFailure,
    KVTransfer,
    RequestFailure,
    RequestOutput,
    StepOutput,
)
from lightllm.scheduler.request import Request
from lightllm.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

# So many requests that fail alone with no good step between them, or failed steps with nobody at fault: it is
# not the requests.
MAX_FAILURES = 3
# Steps with nobody at fault that are further apart than this have nothing to do with each other.
FORGOTTEN_AFTER_STEPS = 1000
CUT_OFF = "a step of this node failed while KV moved; the prompt is to be computed elsewhere"


class StepFailed(Exception):
    """A step's exception, which is the cause of this one, where the engine may go on after it."""


def result_of(pending: Pending) -> StepOutput:
    """Wait for a step.

    Raises:
        StepFailed: it raised.
        LightLLMError: what computes is gone.
    """
    try:
        return pending.result()
    except LightLLMError:
        raise
    except Exception as error:
        raise StepFailed(f"{type(error).__name__}: {error}") from error


class Recovered(NamedTuple):
    """The scheduler to go on with, outputs of requests that ended or got on meanwhile, ended transfers."""

    scheduler: Scheduler
    outputs: list[RequestOutput]
    kv_transfers: list[KVTransfer]


class Recovery:
    """Makes a scheduler in which all go on but those at fault.

    Args:
        executor, clock: as the engine's.
    """

    def __init__(self, executor: Executor, clock: Callable[[], float]) -> None:
        self._executor, self._clock = executor, clock
        self._num_alone = 0
        self._num_fruitless = 0
        self._num_steps = 0

    def run(self, scheduler: Scheduler, failure: StepFailed, num_steps: int) -> Recovered:
        """Go on after the oldest step in flight has failed; those behind it have been waited for.

        Args:
            scheduler: not to be used any more.
            num_steps: the engine's steps so far.

        Raises:
            StepFailed: it is not the requests.
        """
        self._num_alone *= num_steps == self._num_steps
        self._num_fruitless *= num_steps - self._num_steps < FORGOTTEN_AFTER_STEPS
        self._num_steps = num_steps
        names = scheduler.suspects()
        logger.error("a step failed; trying its %d requests one by one", len(names), exc_info=failure)
        left, kv_transfers = self._end_transfers(scheduler, names)
        outputs, scheduler = left.outputs, scheduler.successor()
        num_found = 0
        for name in names:
            try:
                outputs += self._try_alone(scheduler, left, name)
                self._num_alone = 0
            except StepFailed as error:
                num_found += 1
                self._num_alone += 1
                if self._num_alone == MAX_FAILURES:
                    raise
                logger.error("%s is at fault: %s", name, error)
                left.forget(name)
                outputs.append(_failed(name, error))
                result_of(self._executor.submit(scheduler.last_orders()))
                scheduler = scheduler.successor()
        self._num_fruitless = 0 if num_found else self._num_fruitless + 1
        if self._num_fruitless == MAX_FAILURES:
            raise failure
        for name, request in left.live.items():
            refused = scheduler.add(request, self._clock(), is_leased=name in left.leased)
            outputs += [] if refused is None else [refused]
        outputs += left.cut_off.values()
        return Recovered(scheduler, outputs, kv_transfers)

    def _end_transfers(self, scheduler: Scheduler, suspects: list[str]) -> tuple["_Left", list[KVTransfer]]:
        """End all transfers; what is left of the requests, and the figures of what has ended."""
        orders = scheduler.last_orders()
        ended = result_of(self._executor.submit(orders))
        arrived = {arrival.request_id: arrival.first_token_id for arrival in ended.kv_received}
        left = _Left()
        for name, request in scheduler.requests.items():
            if request.lease_until_s < math.inf:
                left.leased.add(name)
            if name in suspects:
                left.trials[name] = _alone(request)
            if name in arrived:
                left.go_on_behind(request, arrived[name])
            elif name in ended.kv_sent and request.num_output_tokens and not request.num_in_flight:
                left.outputs.append(request.transfer_output(None))
            elif name in orders.kv_cancels or (name in left.trials and request.send_kv_to is not None):
                # One that is tried has a token afterwards that the other node would not expect.
                left.cut_off[name] = request.transfer_output(KVFailure(request_id=name, reason=CUT_OFF))
            else:
                left.live[name] = request.continuation()
        return left, ended.kv_transfers

    def _try_alone(self, scheduler: Scheduler, left: "_Left", name: str) -> list[RequestOutput]:
        """Compute until the request has a new token, and note what is left of it."""
        added = scheduler.add(left.trials[name], self._clock())
        outputs = [] if added is None else [added]
        while not outputs:
            batch = scheduler.schedule(self._clock())
            assert batch is not None, f"{name} alone does not get on"
            outputs += scheduler.update(result_of(self._executor.submit(batch)))
        request = scheduler.requests.get(name)
        if request is None:
            left.forget(name)
        else:
            if name in left.live:
                left.live[name] = request.continuation()
            scheduler.abort(name, "abort")
        return outputs


class _Left:
    """What is left of the requests of a scheduler that is given up.

    Attributes:
        live: those that go on, as new requests; `leased` are the ids of those that have a lease.
        trials: those of the failed step, to be computed here alone, without any transfer.
        cut_off: last outputs of those whose transfer ended here, and that go on elsewhere.
        outputs: of those that have ended well.
    """

    def __init__(self) -> None:
        self.live: dict[str, EngineRequest] = {}
        self.leased: set[str] = set()
        self.trials: dict[str, EngineRequest] = {}
        self.cut_off: dict[str, RequestOutput] = {}
        self.outputs: list[RequestOutput] = []

    def go_on_behind(self, request: Request, first_token_id: int) -> None:
        """All its KV has arrived and is lost; the first token behind it is known, and its client has it."""
        request.token_ids.append(first_token_id)
        reason = request.finish_reason()
        if reason is not None:
            self.outputs.append(request.final_output(reason))
        else:
            self.live[request.request_id] = _alone(request)

    def forget(self, request_id: str) -> None:
        """It has ended."""
        self.live.pop(request_id, None)
        self.cut_off.pop(request_id, None)


def _alone(request: Request) -> EngineRequest:
    """The rest of a request for this node alone."""
    return msgspec.structs.replace(request.continuation(), send_kv_to=None, recv_kv_from=None)


def _failed(request_id: str, failure: StepFailed) -> RequestOutput:
    message = f"a step of this request failed: {failure}; other requests are not affected"
    return RequestOutput(
        request_id=request_id, finish_reason="error", error=RequestFailure(code="internal", message=message)
    )
