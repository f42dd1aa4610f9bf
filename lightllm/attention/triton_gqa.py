"""Attention on a GPU by Triton kernels over the token-granular pool: prompts, chunks and decode in one batch.

Sequences with one new token go to the decode kernel, which cuts long ones into ranges where there are few of
them; all others go to the prefill kernel as tiles of queries. Both read the pool through the slot table, so a
shared prefix is read where it lies. Keys and values of the new tokens are written first.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from lightllm.attention.base import AttentionLayer, RotatingBackend
from lightllm.device.forward_batch import ForwardBatch
from lightllm.kernels.decode_attention import decode_attention
from lightllm.kernels.kv_write import kv_write
from lightllm.kernels.prefill_attention import TILE_FIELDS, prefill_attention
from lightllm.model_config import ModelConfig

# Programs that keep a large GPU busy: a few for each of some 130 multiprocessors.
TARGET_PROGRAMS = 528
MAX_SPLITS = 64
MAX_TILE, MIN_TILE = 128, 16


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Sequences with one new token.

    Attributes:
        tokens, rows, seq_lens: [n] int32.
        num_splits: ranges of keys per sequence.
        partial, logsumexp: scratch of the kernel; None with one split.
    """

    tokens: Tensor
    rows: Tensor
    seq_lens: Tensor
    num_splits: int
    partial: Tensor | None
    logsumexp: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Sequences with several new tokens, as tiles for the kernel."""

    tiles: Tensor
    block_m: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Every token of the batch is in exactly one of these."""

    decode: DecodePlan | None
    prefill: PrefillPlan | None


class TritonAttention(RotatingBackend):
    """Made for a model's head counts, which the plan needs.

    Args:
        num_q_heads, head_dim: of the model.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, num_q_heads: int, head_dim: int) -> None:
        self.num_q_heads = num_q_heads
        self.head_dim = head_dim

    @classmethod
    def for_model(cls, config: ModelConfig) -> Self:
        return cls(config.num_attention_heads, config.head_dim)

    def plan(self, batch: ForwardBatch) -> Plan:
        """Split the batch into decode and tiles.

        A batch of decodes only is planned from device tensors alone, so that the plan may be part of a graph.
        """
        index = batch.index
        assert index is not None, "this backend reads the batch on the device"
        is_decode = batch.query_lens == 1
        if is_decode.all():
            n = len(batch.query_lens)
            tokens = torch.arange(n, dtype=torch.int32, device=index.rows.device)
            return Plan(self._plan_decode(batch, tokens, index.rows, index.seq_lens), None)
        return self.plan_members(batch, np.arange(len(is_decode)))

    def plan_members(self, batch: ForwardBatch, members: np.ndarray) -> Plan:
        """Split some sequences of the batch into decode and tiles.

        Args:
            members: [n] their places in the batch.
        """
        assert batch.index is not None
        is_decode = batch.query_lens[members] == 1
        prefills, decodes = members[~is_decode], members[is_decode]
        query_lens = batch.query_lens[prefills]
        num_kv_heads = batch.kv_pool.num_kv_heads
        longest = int(query_lens.max(initial=0)) * self.num_q_heads // num_kv_heads
        block_m, tile_tokens = self.tile_shape(
            num_kv_heads, MAX_TILE if longest > MAX_TILE // 2 else MAX_TILE // 2
        )
        starts = batch.seq_lens[prefills] - query_lens
        tiles = self.tiles(
            batch.rows[prefills], starts, query_lens, tile_tokens, batch.cu_seqlens_q[prefills]
        )
        columns = [batch.cu_seqlens_q[decodes], batch.rows[decodes], batch.seq_lens[decodes]]
        # Each part starts at a multiple of 16 bytes: Triton compiles a kernel anew for other alignments.
        width = -(-len(decodes) // 4) * 4
        packed = np.zeros(tiles.size + 3 * width, dtype=np.int32)
        packed[: tiles.size] = tiles.reshape(-1)
        for i, column in enumerate(columns):
            packed[tiles.size + i * width :][: len(decodes)] = column
        uploaded = _upload(packed, batch.index.rows.device)
        prefill = decode = None
        if len(prefills):
            prefill = PrefillPlan(uploaded[: tiles.size].view(-1, TILE_FIELDS), block_m)
        if len(decodes):
            parts = (uploaded[tiles.size + i * width :][: len(decodes)] for i in range(3))
            decode = self._plan_decode(batch, *parts)
        return Plan(decode, prefill)

    def plan_tiles(self, tiles: Tensor, block_m: int) -> Plan:
        """The plan of a batch all of whose tokens are in these tiles."""
        return Plan(None, PrefillPlan(tiles, block_m))

    def tile_shape(self, num_kv_heads: int, block_m: int) -> tuple[int, int]:
        """The next size of a tile in queries that holds all heads of a token, and what it has in tokens."""
        group = self.num_q_heads // num_kv_heads
        block_m = max(block_m, MIN_TILE, 1 << (group - 1).bit_length())
        return block_m, block_m // group

    @staticmethod
    def tiles(
        rows: np.ndarray,
        starts: np.ndarray,
        query_lens: np.ndarray,
        tile_tokens: int,
        first_tokens: np.ndarray | None = None,
    ) -> np.ndarray:
        """Cut the new tokens of sequences into tiles: [num_tiles, TILE_FIELDS] int32, the longest first.

        Args:
            rows, starts, query_lens: [n] row, position of the first new token, number of new tokens.
            first_tokens: [n] where in the batch these begin; None: one behind the other.
        """
        if first_tokens is None:
            first_tokens = query_lens.cumsum() - query_lens
        counts = -(-query_lens // tile_tokens)
        owner = np.repeat(np.arange(len(rows)), counts)
        offset = (np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)) * tile_tokens
        tiles = np.empty((len(owner), TILE_FIELDS), dtype=np.int32)
        tiles[:, 0] = rows[owner]
        tiles[:, 1] = first_tokens[owner] + offset
        tiles[:, 2] = np.minimum(query_lens[owner] - offset, tile_tokens)
        tiles[:, 3] = starts[owner] + offset
        return tiles[np.argsort(-tiles[:, 3], kind="stable")]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        """See the base class."""
        return self._forward(q, k, v, None, layer, batch)

    def rotate_and_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor],
        layer: AttentionLayer,
        batch: ForwardBatch,
    ) -> Tensor:
        """See the base class."""
        return self._forward(q, k, v, rotary, layer, batch)

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        layer: AttentionLayer,
        batch: ForwardBatch,
    ) -> Tensor:
        pool_k, pool_v = batch.kv_pool.k[layer.index], batch.kv_pool.v[layer.index]
        kv_write(q, k, v, pool_k, pool_v, batch.out_slots, rotary)
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        self._attend(q, out, layer, batch)
        return out

    def _attend(self, q: Tensor, out: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> None:
        """Write the result of every token into `out`, [num_tokens, num_q_heads * head_dim]."""
        assert batch.index is not None
        pool_k, pool_v = batch.kv_pool.k[layer.index], batch.kv_pool.v[layer.index]
        table = batch.index.slot_table
        plan: Plan = batch.plan
        if plan.prefill is not None:
            prefill_attention(
                q,
                pool_k,
                pool_v,
                table,
                plan.prefill.tiles,
                out,
                scale=layer.scale,
                window=layer.window,
                softcap=layer.softcap,
                block_m=plan.prefill.block_m,
            )
        if plan.decode is not None:
            decode_attention(
                q,
                pool_k,
                pool_v,
                table,
                plan.decode.tokens,
                plan.decode.rows,
                plan.decode.seq_lens,
                out,
                scale=layer.scale,
                window=layer.window,
                softcap=layer.softcap,
                num_splits=plan.decode.num_splits,
                partial=plan.decode.partial,
                logsumexp=plan.decode.logsumexp,
            )

    def _plan_decode(self, batch: ForwardBatch, tokens: Tensor, rows: Tensor, seq_lens: Tensor) -> DecodePlan:
        """The number of splits depends on the number of sequences only: a graph is right for all lengths."""
        n = rows.shape[0]
        num_splits = num_decode_splits(n * batch.kv_pool.num_kv_heads)
        if num_splits == 1:
            return DecodePlan(tokens, rows, seq_lens, 1, None, None)
        scratch = torch.empty(
            n * self.num_q_heads * num_splits, self.head_dim + 1, dtype=torch.float32, device=rows.device
        ).flatten()
        size = n * self.num_q_heads * num_splits * self.head_dim
        return DecodePlan(tokens, rows, seq_lens, num_splits, scratch[:size], scratch[size:])


def num_decode_splits(num_pairs: int) -> int:
    """Ranges per sequence for so many pairs of a sequence and a KV head: enough programs, no more."""
    return max(1, min(MAX_SPLITS, -(-TARGET_PROGRAMS // num_pairs)))


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
