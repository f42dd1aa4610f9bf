"""CUDA graphs of decode steps: one per batch size. A batch of decodes is padded to the next size."""

from bisect import bisect_left

import numpy as np
import torch
from torch import Tensor

from lightllm.attention.base import AttentionBackend
from lightllm.device.forward_batch import ForwardBatch
from lightllm.device.kv_pool import KVPool
from lightllm.messages import ScheduledBatch
from lightllm.models.base import Model
from lightllm.worker.cuda_graph import GraphMemory, LazyGraphs
from lightllm.worker.device_tables import DeviceTables, StepTensors, aligned


class DecodeGraphs(LazyGraphs):
    """Computes decode batches of fixed sizes.

    Args:
        memory: see LazyGraphs.
        sizes: batch sizes, rising.
        max_len: a batch with a longer sequence is not taken.
        enable_capture: see LazyGraphs.
        vocab_size: columns of the logits that this rank gets; None: the model's.
    """

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        kv_pool: KVPool,
        tables: DeviceTables,
        memory: GraphMemory,
        *,
        sizes: list[int],
        max_len: int,
        enable_capture: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__("sequences", sizes, memory, enable_capture)
        self.model = model
        self.backend = backend
        self.kv_pool = kv_pool
        self.tables = tables
        self.max_len = max_len
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
        self._run(tensors.size)
        return self._logits[: tensors.size]

    def _compute(self, size: int) -> None:
        tensors = self._tensors(size)
        ones = np.ones(size, dtype=np.int64)
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
        self._logits[:size].copy_(self.model.logits(hidden))

    def _tensors(self, size: int) -> StepTensors:
        if size not in self._step_tensors:
            self._step_tensors[size] = StepTensors.inside(
                size, self._packed, self._columns, self.tables.slots
            )
        return self._step_tensors[size]
