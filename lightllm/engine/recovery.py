"""After a step that raised: find the request at fault, end it, and let all others go on.

What a failed step has written, and what later ones built on it, counts as lost. So every live request goes on
as it would on another node, as a new request with the tokens that it has. Those of the failed step are first
tried one by one; one whose step raises again, alone, ends in an error. Runs in the engine process.
"""

import logging
from collections.abc import Callable

from lightllm.engine.executor import Executor, Pending
from lightllm.errors import LightLLMError
from lightllm.messages import EngineRequest, RequestFailure, RequestOutput, StepOutput
from lightllm.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

# So many requests that fail alone with no good step between them, or failed steps with nobody at fault: it is
# not the requests.
MAX_FAILURES = 3
# Steps with nobody at fault that are further apart than this have nothing to do with each other.
FORGOTTEN_AFTER_STEPS = 1000


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

    def run(
        self, scheduler: Scheduler, failure: StepFailed, num_steps: int
    ) -> tuple[Scheduler, list[RequestOutput]]:
        """Go on after the oldest step in flight has failed; those behind it have been waited for.

        Args:
            scheduler: not to be used any more.
            num_steps: the engine's steps so far.

        Returns:
            The scheduler to go on with, and outputs of requests that have ended or got on meanwhile.

        Raises:
            StepFailed: it is not the requests, or KV is on its way between nodes, to slots of this scheduler.
        """
        if scheduler.is_transferring:
            raise failure
        self._num_alone *= num_steps == self._num_steps
        self._num_fruitless *= num_steps - self._num_steps < FORGOTTEN_AFTER_STEPS
        self._num_steps = num_steps
        names = scheduler.suspects()
        logger.error("a step failed; trying its %d requests one by one", len(names), exc_info=failure)
        live = {name: request.continuation() for name, request in scheduler.requests.items()}
        scheduler = scheduler.successor()
        outputs: list[RequestOutput] = []
        num_found = 0
        for name in names:
            try:
                outputs += self._try_alone(scheduler, live, name)
                self._num_alone = 0
            except StepFailed as error:
                num_found += 1
                self._num_alone += 1
                if self._num_alone == MAX_FAILURES:
                    raise
                logger.error("%s is at fault: %s", name, error)
                scheduler = scheduler.successor()
                outputs.append(_failed(name, error))
        self._num_fruitless = 0 if num_found else self._num_fruitless + 1
        if self._num_fruitless == MAX_FAILURES:
            raise failure
        for request in live.values():
            refused = scheduler.add(request, self._clock())
            outputs += [] if refused is None else [refused]
        return scheduler, outputs

    def _try_alone(
        self, scheduler: Scheduler, live: dict[str, EngineRequest], name: str
    ) -> list[RequestOutput]:
        """Compute until the request has a new token; puts what is left of it in its place in `live`."""
        added = scheduler.add(live.pop(name), self._clock())
        outputs = [] if added is None else [added]
        while not outputs:
            batch = scheduler.schedule(self._clock())
            assert batch is not None, f"{name} alone does not get on"
            outputs += scheduler.update(result_of(self._executor.submit(batch)))
        request = scheduler.requests.get(name)
        if request is not None:
            live[name] = request.continuation()
            scheduler.abort(name, "abort")
        return outputs


def _failed(request_id: str, failure: StepFailed) -> RequestOutput:
    message = f"a step of this request failed: {failure}; other requests are not affected"
    return RequestOutput(
        request_id=request_id, finish_reason="error", error=RequestFailure(code="internal", message=message)
    )
