"""Attention of long prompts by FlashInfer's kernels for Hopper; all else by Triton's.

Decodes and short prompts are left where they are: decode reads memory as fast as it goes. Long prompts are
computed with pages of one token over the pool, so that nothing is copied and prefixes are shared as before.

What a step uses      | where                                   | who keeps it from being written too early
----------------------|-----------------------------------------|--------------------------------------------
slots of the prompts  | a tensor on the device, new in each step| torch: its memory is free behind the step
schedule, on the host | pinned memory of a wrapper              | we: until its copy to the device is done
schedule, for kernels | the device's memory, of the same wrapper| the order of the device's work

While step N's copy waits behind step N - 1's kernels, step N + 1 is planned already: so steps use two sets of
wrappers in turn, and a wrapper that is planned again first waits for its last copy, that of step N - 1, which
is as good as always done.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightllm.attention.base import AttentionLayer
from lightllm.attention.flashinfer_kernels import KERNELS
from lightllm.attention.spans import long_span
from lightllm.attention.triton_gqa import Plan, TritonAttention
from lightllm.device.base import Moment, PastMoment
from lightllm.device.cuda import CudaMoment
from lightllm.device.forward_batch import ForwardBatch

# Prompts and chunks of so many new tokens or more are long. Their kernels take 0.6 to 0.85 of Triton's time
# on an H200 from 256 tokens on, but a plan takes the host 0.4 to 1.2 ms more, which short ones lose.
LONG_QUERY_LEN = 512

Kind = tuple[float, int | None, float | None]
"""Scale, window and softcap: layers that agree in these share a plan."""


class LongPrompts(NamedTuple):
    """n sequences as FlashInfer wants them; int32, pinned on the host if not said otherwise.

    Attributes:
        cu_seqlens_q, cu_seqlens: [n + 1] where the new tokens and the slots of each begin.
        slots: [cu_seqlens[-1]] on the device, of all tokens of the sequences.
        seq_lens: [n].
        last_page_lens: [n] ones: a page has one token.
    """

    cu_seqlens_q: Tensor
    cu_seqlens: Tensor
    slots: Tensor
    seq_lens: Tensor
    last_page_lens: Tensor


class PlannedKernel:
    """A wrapper of FlashInfer's, with a schedule for one step and kind of layer.

    Takes 8 MiB on the device and as much pinned on the host.
    """

    def __init__(self, device: torch.device) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper  # takes a second

        # For parts of a result that are added up later, which these kernels never make.
        scratch = torch.empty(1, dtype=torch.uint8, device=device)
        self._wrapper: Any = BatchPrefillWithPagedKVCacheWrapper(scratch, "NHD", backend=KERNELS)
        self._copied: Moment = PastMoment()

    def plan(
        self, prompts: LongPrompts, layer: AttentionLayer, batch: ForwardBatch, num_q_heads: int
    ) -> None:
        """Schedule the work of a layer like this one. Waits for nothing but the copy of the last schedule."""
        pool = batch.kv_pool
        self._copied.wait()
        self._wrapper.plan(
            prompts.cu_seqlens_q,
            prompts.cu_seqlens,
            prompts.slots,
            prompts.last_page_lens,
            num_q_heads,
            pool.num_kv_heads,
            pool.head_dim,
            page_size=1,
            causal=True,
            sm_scale=layer.scale,
            window_left=-1 if layer.window is None else layer.window - 1,  # tokens before the own one
            logits_soft_cap=layer.softcap,
            q_data_type=pool.k[0].dtype,
            seq_lens=prompts.seq_lens,
        )
        self._copied = CudaMoment()

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Attend.

        Args:
            q, out: [num_tokens, num_q_heads, head_dim], the tokens of the planned sequences.
            k, v: [num_slots, num_kv_heads, head_dim], the pool of the layer.
        """
        self._wrapper.run(q, (k.unsqueeze(1), v.unsqueeze(1)), out=out)


@dataclass(frozen=True, slots=True)
class LongPlan(Plan):
    """A plan with long prompts beside what Triton computes.

    Attributes:
        tokens: the places of the prompts' tokens in the batch.
        prompts: their sequences.
        free: wrappers for this step; made when needed.
        planned: those planned for it, by kind of layer; the first layer of a kind adds its own.
    """

    tokens: slice
    prompts: LongPrompts
    free: list[PlannedKernel]
    planned: dict[Kind, PlannedKernel]


class FlashInferAttention(TritonAttention):
    """Made for a model's head counts. Between steps it keeps wrappers, for nothing but their memory.

    Args:
        num_q_heads, head_dim: of the model.
        long_query_len: see AttentionBackend; at least 2, so that decodes are never long.
    """

    name: ClassVar[str] = "flashinfer"

    def __init__(self, num_q_heads: int, head_dim: int, long_query_len: int = LONG_QUERY_LEN) -> None:
        super().__init__(num_q_heads, head_dim)
        assert long_query_len > 1
        self.long_query_len: int = long_query_len
        self._wrappers: tuple[list[PlannedKernel], list[PlannedKernel]] = ([], [])
        self._turn = 0

    def plan(self, batch: ForwardBatch) -> Plan:
        """Split the batch; one without long prompts has the plan that Triton alone would have."""
        span = long_span(batch.query_lens, self.long_query_len)
        if span is None:
            return super().plan(batch)
        others = np.delete(np.arange(len(batch.query_lens)), span)
        rest = self.plan_members(batch, others) if len(others) else Plan(None, None)
        self._turn = 1 - self._turn
        cu_seqlens_q = batch.cu_seqlens_q
        return LongPlan(
            rest.decode,
            rest.prefill,
            slice(int(cu_seqlens_q[span.start]), int(cu_seqlens_q[span.stop])),
            _prompts(batch, span),
            self._wrappers[self._turn],
            {},
        )

    def _attend(self, q: Tensor, out: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> None:
        plan = batch.plan
        if isinstance(plan, LongPlan):
            pool, tokens = batch.kv_pool, plan.tokens
            kernel = self._planned_kernel(plan, layer, batch)
            rows = out.view(q.shape)
            kernel.run(q[tokens], pool.k[layer.index], pool.v[layer.index], rows[tokens])
        super()._attend(q, out, layer, batch)

    def _planned_kernel(self, plan: LongPlan, layer: AttentionLayer, batch: ForwardBatch) -> PlannedKernel:
        kind = (layer.scale, layer.window, layer.softcap)
        if kind not in plan.planned:
            position = len(plan.planned)
            if position == len(plan.free):
                plan.free.append(PlannedKernel(batch.out_slots.device))
            kernel = plan.free[position]
            kernel.plan(plan.prompts, layer, batch, self.num_q_heads)
            plan.planned[kind] = kernel
        return plan.planned[kind]


def _prompts(batch: ForwardBatch, span: slice) -> LongPrompts:
    """The sequences in `span`; their slots are gathered on the device, where the newest are known."""
    assert batch.index is not None
    rows, seq_lens = batch.rows[span], batch.seq_lens[span]
    n, zero = len(rows), np.zeros(1, dtype=np.int64)
    ends_q, ends = batch.query_lens[span].cumsum(), seq_lens.cumsum()
    packed = np.concatenate([zero, ends_q, zero, ends, seq_lens, zero.repeat(n) + 1]).astype(np.int32)
    pinned = torch.from_numpy(packed).pin_memory()
    cu_seqlens_q, cu_seqlens, lens, ones = torch.split(pinned, [n + 1, n + 1, n, n])
    table = batch.index.slot_table
    slots = torch.cat([table[row, :end] for row, end in zip(rows.tolist(), seq_lens.tolist(), strict=True)])
    return LongPrompts(cu_seqlens_q, cu_seqlens, slots, lens, ones)
