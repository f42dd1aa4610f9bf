"""CUDA graphs of small steps with prompts, for a server that has few requests at a time.

A few hundred tokens are computed faster than Python can launch the kernels of all layers one by one. Such a
step is padded to the next size: by a sequence that is nobody's, so that every token has its place. All its
sequences, also those that decode, are cut into tiles for the prefill kernel. Runs in the worker's thread.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightllm.attention.triton_gqa import TritonAttention
from lightllm.device.base import Device
from lightllm.device.forward_batch import DeviceIndex, ForwardBatch
from lightllm.device.kv_pool import KVPool
from lightllm.kernels.prefill_attention import TILE_FIELDS
from lightllm.kernels.row_tables import gather_inputs
from lightllm.messages import ScheduledBatch
from lightllm.models.base import Model
from lightllm.worker.cuda_graph import GraphMemory, LazyGraphs
from lightllm.worker.device_tables import DeviceTables
from lightllm.worker.inputs import StepInputs, ranges

MAX_SEQUENCES = 8
# A decode is read by one program for each KV head, which is slow where its sequence is long.
MAX_DECODE_LEN = 4096
BLOCK_M = 64


class PromptTensors(NamedTuple):
    """Where the inputs of a step of `size` tokens lie.

    Attributes:
        packed: [2 * size + num_tiles * TILE_FIELDS] int32, what is uploaded: the next three.
        rows, packed_positions: [size] int32, of each token.
        tiles: [num_tiles, TILE_FIELDS] int32.
        token_ids, out_slots, positions: [size] int64.
    """

    packed: Tensor
    rows: Tensor
    packed_positions: Tensor
    tiles: Tensor
    token_ids: Tensor
    out_slots: Tensor
    positions: Tensor


class PromptGraphs(LazyGraphs):
    """Computes small steps with prompts.

    Args:
        sizes: numbers of tokens, rising; no more than a row has places between two of them.
        memory, enable_capture: see LazyGraphs.
    """

    def __init__(
        self,
        model: Model,
        backend: TritonAttention,
        kv_pool: KVPool,
        tables: DeviceTables,
        device: Device,
        memory: GraphMemory,
        *,
        sizes: list[int],
        enable_capture: bool = True,
    ) -> None:
        super().__init__("tokens of prompts", sizes, memory, enable_capture)
        self.model = model
        self.backend = backend
        self.kv_pool = kv_pool
        self.tables = tables
        self.device = device
        self.block_m, self.tile_tokens = backend.tile_shape(kv_pool.num_kv_heads, BLOCK_M)
        self._tensors = {size: self._make_tensors(size) for size in self.sizes}
        dtype = kv_pool.k[0].dtype
        shape = (self.sizes[-1], model.config.hidden_size)
        self._hidden = torch.empty(shape, dtype=dtype, device=device.torch_device)

    def size_for(self, batch: ScheduledBatch) -> int | None:
        """The size that this step is padded to; None if it is not one for a graph."""
        num_tokens = sum(batch.num_new_tokens)
        if (
            len(batch.rows) > MAX_SEQUENCES
            or not max(batch.num_new_tokens) > 1
            or num_tokens > self.sizes[-1]
        ):
            return None
        steps = zip(batch.starts, batch.num_new_tokens, strict=True)
        if any(count == 1 and start >= MAX_DECODE_LEN for start, count in steps):
            return None
        return next(size for size in self.sizes if size >= num_tokens)

    def run(self, batch: ScheduledBatch, size: int) -> tuple[StepInputs, Tensor]:
        """Compute a batch that the tables have been told of.

        Returns:
            The inputs without padding, and the hidden states of all their tokens, valid until the next call.
        """
        tensors = self._tensors[size]
        query_lens = np.array(batch.num_new_tokens)
        seq_lens = np.array(batch.starts) + query_lens
        num_tokens = int(query_lens.sum())
        num_padding = size - num_tokens
        rows, starts, counts = batch.rows, batch.starts, batch.num_new_tokens
        if num_padding:
            rows, starts = [*rows, self.tables.padding_row], [*starts, 0]
            counts = [*counts, num_padding]
        packed = np.zeros(tensors.packed.shape[0], dtype=np.int32)
        packed[:size], packed[size : 2 * size] = ranges(rows, starts, counts)
        tiles = self.backend.tiles(np.array(rows), np.array(starts), np.array(counts), self.tile_tokens)
        packed[2 * size : 2 * size + tiles.size] = tiles.reshape(-1)  # tiles behind these have no tokens
        self.device.upload(packed, tensors.packed)
        gather_inputs(
            self.tables.token_ids,
            self.tables.slots,
            tensors.rows,
            tensors.packed_positions,
            tensors.token_ids,
            tensors.out_slots,
            tensors.positions,
        )
        self._run(size)
        inputs = StepInputs(
            rows=np.array(batch.rows),
            token_ids=tensors.token_ids[:num_tokens],
            out_slots=tensors.out_slots[:num_tokens],
            positions=tensors.positions[:num_tokens],
            seq_lens=seq_lens,
            query_lens=query_lens,
        )
        return inputs, self._hidden[:num_tokens]

    def _compute(self, size: int) -> None:
        tensors = self._tensors[size]
        one = np.array([size])  # the plan is not made of these
        batch = ForwardBatch.build(
            rows=one,
            seq_lens=one,
            query_lens=one,
            positions=tensors.positions,
            out_slots=tensors.out_slots,
            slot_table=np.empty((0, 0), dtype=np.int32),
            kv_pool=self.kv_pool,
            index=DeviceIndex(self.tables.slots, tensors.rows, tensors.packed_positions),
        )
        batch.plan = self.backend.plan_tiles(tensors.tiles, self.block_m)
        self._hidden[:size].copy_(self.model(tensors.token_ids, tensors.positions, batch))

    def _make_tensors(self, size: int) -> PromptTensors:
        # One tile more than its tokens need for each sequence, and for the padding.
        num_tiles = -(-size // self.tile_tokens) + MAX_SEQUENCES + 1
        device = self.tables.slots.device
        packed = torch.zeros(2 * size + num_tiles * TILE_FIELDS, dtype=torch.int32, device=device)
        columns = torch.zeros(3, size, dtype=torch.int64, device=device)
        return PromptTensors(
            packed,
            packed[:size],
            packed[size : 2 * size],
            packed[2 * size :].view(num_tiles, TILE_FIELDS),
            *columns.unbind(),
        )
