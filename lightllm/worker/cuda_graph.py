"""CUDA graphs of decode steps: one per batch size, captured while the server already runs.

A batch of decodes is padded to the next size and computed from fixed memory. A size that has been used a few
times, computed eagerly from that same memory, gets its graph between two steps; capturing runs nothing on the
device, which meanwhile works on the step before. All graphs share one pool of memory, since they never run
side by side. Runs in the worker's thread.
"""

import logging
import time
from bisect import bisect_left

import numpy as np
import torch
from torch import Tensor

from lightllm.attention.base import AttentionBackend
from lightllm.device.forward_batch import ForwardBatch
from lightllm.device.kv_pool import KVPool
from lightllm.messages import ScheduledBatch
from lightllm.models.base import Model
from lightllm.worker.device_tables import DeviceTables, StepTensors, aligned

logger = logging.getLogger(__name__)

# Eager steps of a size before it is captured: the first compile its kernels.
MIN_USES = 2


class DecodeGraphs:
    """Computes decode batches of fixed sizes, from a graph where there is one.

    Args:
        sizes: batch sizes, rising.
        max_len: a batch with a longer sequence is not taken.
        enable_capture: off, everything is computed eagerly: the same numbers, for tests.
        vocab_size: columns of the logits that this rank gets; None: the model's.
    """

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        kv_pool: KVPool,
        tables: DeviceTables,
        *,
        sizes: list[int],
        max_len: int,
        enable_capture: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        self.kv_pool = kv_pool
        self.tables = tables
        self.sizes = sizes
        self.max_len = max_len
        self.enable_capture = enable_capture
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._uses = dict.fromkeys(sizes, 0)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        device, largest = tables.slots.device, sizes[-1]
        self._packed = torch.zeros(3 * aligned(largest), dtype=torch.int32, device=device)
        self._columns = torch.zeros(3, aligned(largest), dtype=torch.int64, device=device)
        self._step_tensors: dict[int, StepTensors] = {}
        width = model.config.vocab_size if vocab_size is None else vocab_size
        self._logits = torch.empty(largest, width, dtype=torch.float32, device=device)

    def tensors_for(self, batch: ScheduledBatch) -> StepTensors | None:
        """Where to put the inputs of this batch; None if it is not one of decodes, or too large or long."""
        n = len(batch.rows)
        is_decode = batch.num_new_tokens.count(1) == n and all(batch.is_sampling)
        if n > self.sizes[-1] or not is_decode or max(batch.starts) >= self.max_len:
            return None
        return self._tensors(self.sizes[bisect_left(self.sizes, n)])

    def run(self, tensors: StepTensors) -> Tensor:
        """Compute from the inputs that lie there; logits [size, vocab_size], valid until the next call."""
        graph = self.graphs.get(tensors.size)
        if graph is None:
            self._uses[tensors.size] += 1
            self._compute(tensors)
        else:
            graph.replay()
        return self._logits[: tensors.size]

    def capture_next(self) -> None:
        """Capture the graph that was missed most often, if one was often enough. Call between steps."""
        size = max(self._uses, key=self._uses.__getitem__)
        if self.enable_capture and self._uses[size] >= MIN_USES:
            self._capture(self._tensors(size))

    def _capture(self, tensors: StepTensors) -> None:
        started = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Other threads of the process (the engine waiting for a result) must not end the capture.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            self._compute(tensors)
            graph.capture_end()
        self.graphs[tensors.size] = graph
        self._uses[tensors.size] = -1
        duration_ms = (time.perf_counter() - started) * 1e3
        logger.debug("captured the graph of %d sequences in %.0f ms", tensors.size, duration_ms)

    def _compute(self, tensors: StepTensors) -> None:
        ones = np.ones(tensors.size, dtype=np.int64)
        batch = ForwardBatch.build(
            rows=ones,  # a plan of decodes reads the index only
            seq_lens=ones,
            query_lens=ones,
            positions=tensors.positions,
            out_slots=tensors.out_slots,
            slot_table=np.empty((0, 0), dtype=np.int32),
            kv_pool=self.kv_pool,
            index=tensors.index,
        )
        batch.plan = self.backend.plan(batch)
        hidden = self.model(tensors.token_ids, tensors.positions, batch)
        self._logits[: tensors.size].copy_(self.model.logits(hidden))

    def _tensors(self, size: int) -> StepTensors:
        if size not in self._step_tensors:
            self._step_tensors[size] = StepTensors.inside(
                size, self._packed, self._columns, self.tables.slots
            )
        return self._step_tensors[size]
