"""Executors compute scheduled batches; the engine sees nothing of where.

`submit` returns a Pending at once, whatever the executor: a thread of this process here, worker processes on
one or several machines in process_executor.py. Batches are computed strictly in the order of submission,
which is what lets the scheduler reuse slots and rows without waiting.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

from lightllm.messages import EngineInfo, ScheduledBatch, StepOutput

if TYPE_CHECKING:
    from lightllm.worker.worker import Worker


class Pending(Protocol):
    """A step that has been submitted."""

    def result(self) -> StepOutput:
        """Wait for the step; re-raises the exception that ended it."""
        ...


class Executor(ABC):
    """Computes batches in order."""

    @abstractmethod
    def submit(self, batch: ScheduledBatch) -> Pending:
        """Queue a batch and return without waiting for it."""

    @abstractmethod
    def info(self) -> EngineInfo:
        """Device, dtype and capacity of the loaded model."""

    def watch(self, on_news: Callable[[], None]) -> bool:
        """Have that called, in any thread, when a KV transfer has ended of which the next batch will tell.

        Returns:
            Whether it will be; if not, one has to ask now and then.
        """
        return False

    def check(self) -> None:
        """Raise WorkerDied if a worker is gone. Cheap: called in every turn of the loop."""
        return

    @abstractmethod
    def close(self) -> None:
        """Finish what was submitted and free the workers."""


class LaunchedLater:
    """A batch that the worker's thread will launch, and whose result is then taken in the caller's thread."""

    def __init__(self, launch: Future[Pending]) -> None:
        self._launch = launch

    def result(self) -> StepOutput:
        """See Pending."""
        return self._launch.result().result()


class AnsweredAtOnce(NamedTuple):
    """A batch whose result was there when it was submitted."""

    output: StepOutput

    def result(self) -> StepOutput:
        """See Pending."""
        return self.output


class InProcessExecutor(Executor):
    """One rank, in a thread of the engine process.

    The thread owns all torch state. Python's lock is free while torch computes, so scheduling runs beside it.
    On a device that runs by itself the thread only queues the work, and can queue a step before the one
    before it is done.
    """

    def __init__(self, load: "Callable[[], Worker]") -> None:
        """Load the worker in its thread and wait for it; `load` raises what `Worker.load` raises."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="worker")
        self._worker = self._thread.submit(load).result()

    def submit(self, batch: ScheduledBatch) -> Pending:
        if batch.is_question:  # which any thread may ask, and answer at once
            return AnsweredAtOnce(self._worker.launch(batch).result())
        return LaunchedLater(self._thread.submit(self._worker.launch, batch))

    def watch(self, on_news: Callable[[], None]) -> bool:
        self._worker.watch(on_news)
        return True

    def info(self) -> EngineInfo:
        return self._worker.info()

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._worker.close()
