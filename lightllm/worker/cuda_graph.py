"""CUDA graphs of steps of fixed sizes, captured while the server already runs.

A size that has been used a few times, computed eagerly from the same memory, gets its graph between two
steps; capturing runs nothing on the device, which meanwhile works on the step before. All graphs share one
pool of memory, since they never run side by side. Runs in the worker's thread.
"""

import logging
import time
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Eager steps of a size before it is captured: the first compile its kernels.
MIN_USES = 2


class GraphMemory:
    """What graphs that never run side by side share: their memory, and the stream they are captured on."""

    @cached_property
    def pool(self) -> Any:
        """A handle of torch's."""
        return torch.cuda.graph_pool_handle()

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class LazyGraphs(ABC):
    """Computes steps of some sizes, from a graph where there is one.

    Args:
        what: a step computes, in words for the log.
        sizes: rising.
        memory: for the graphs.
        enable_capture: off, everything is computed eagerly: the same numbers, for tests.
    """

    def __init__(self, what: str, sizes: list[int], memory: GraphMemory, enable_capture: bool) -> None:
        self.what = what
        self.sizes = sizes
        self.memory = memory
        self.enable_capture = enable_capture
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._uses = dict.fromkeys(sizes, 0)

    def capture_next(self) -> None:
        """Capture the graph that was missed most often, if one was often enough. Call between steps."""
        size = max(self._uses, key=self._uses.__getitem__)
        if self.enable_capture and self._uses[size] >= MIN_USES:
            self._capture(size)

    def _run(self, size: int) -> None:
        """Compute a step of that size from its inputs, which lie where they always do."""
        graph = self.graphs.get(size)
        if graph is None:
            self._uses[size] += 1
            self._compute(size)
        else:
            graph.replay()

    @abstractmethod
    def _compute(self, size: int) -> None:
        """Compute it eagerly, into memory that is always the same."""

    def _capture(self, size: int) -> None:
        started = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.memory.stream):
            # Other threads of the process (the engine waiting for a result) must not end the capture.
            graph.capture_begin(pool=self.memory.pool, capture_error_mode="thread_local")
            self._compute(size)
            graph.capture_end()
        self.graphs[size] = graph
        self._uses[size] = -1
        duration_ms = (time.perf_counter() - started) * 1e3
        logger.debug("captured the graph of %d %s in %.0f ms", size, self.what, duration_ms)
