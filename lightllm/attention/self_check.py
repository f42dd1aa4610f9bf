"""Random attention problems, and the comparison of a backend with an oracle on them.

Used at start before a backend is trusted on this machine and build of torch, and by the conformance tests.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import msgspec
import numpy as np
import torch
from torch import Tensor

from lightllm.attention.base import AttentionBackend, AttentionLayer
from lightllm.device.forward_batch import DeviceIndex, ForwardBatch
from lightllm.device.kv_pool import KVPool
from lightllm.model_config import ModelConfig

# Largest accepted error for values of about 1: the rounding of the dtype, several times over.
TOLERANCES: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
)


@dataclass(frozen=True, slots=True)
class Case:
    """A batch and where its slots lie.

    Attributes:
        seq_lens, query_lens: per sequence, as in ForwardBatch.
        slots: [sum(seq_lens)] the slots of all sequences one after the other, above 0; those of new tokens
            belong to one sequence only, a common prefix may be shared.
    """

    seq_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    slots: tuple[int, ...]


# A prompt's second chunk, a whole prompt, short and long sequences decoding; scattered slots, then runs.
START_CASE = Case(
    seq_lens=(40, 7, 9, 11, 300),
    query_lens=(16, 7, 1, 1, 1),
    slots=(*range(60, 0, -2), *range(1, 60, 2), *range(70, 377)),
)

# Shorter than some of its sequences, whatever the model's own is.
START_WINDOW = 24


def long_case(query_len: int) -> Case:
    """A decode, a prompt's last chunk, a short prompt, a whole one; the second and the last are that long."""
    seq_lens = (40, 130 + query_len, 20, query_len + 1)
    half = sum(seq_lens) // 2
    slots = (*range(2 * half, 0, -2), *range(1, 2 * half, 2), *range(2 * half + 1, sum(seq_lens) + 1))
    return Case(seq_lens, (1, query_len, 20, query_len + 1), slots)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a backend made of a case: its result, and keys and values in the pool after it."""

    out: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """A case with its tensors: a batch over a pool of one layer, and its new tokens.

    Attributes:
        q, k, v: as for `AttentionBackend.forward`.
    """

    batch: ForwardBatch
    q: Tensor
    k: Tensor
    v: Tensor

    def run(self, backend: AttentionBackend, layer: AttentionLayer) -> Tensor:
        """Plan and attend; waits for nothing."""
        with torch.inference_mode():
            self.batch.plan = backend.plan(self.batch)
            return backend.forward(self.q, self.k, self.v, layer, self.batch)


CPU = torch.device("cpu")


def check(
    backend: AttentionBackend,
    oracle: AttentionBackend,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> str | None:
    """Compare both on START_CASE, and on long prompts if the backend has kernels of its own for them.

    Each kind of layer that the model has is tried.

    Returns:
        None if they agree, else what is wrong, in words.
    """
    cases = [START_CASE]
    if backend.long_query_len is not None:
        cases.append(long_case(backend.long_query_len))
    kinds = {config.window(i) is not None for i in range(config.num_hidden_layers)}
    for is_sliding in sorted(kinds):
        window = START_WINDOW if is_sliding else None
        layer = AttentionLayer(0, config.attention_scale, window, config.attn_logit_softcapping)
        for case in cases:
            problem = compare(backend, oracle, case, config, dtype, layer=layer, device=device)
            if problem is not None:
                return problem
    return None


def compute(
    backend: AttentionBackend,
    case: Case,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    layer: AttentionLayer | None = None,
    device: torch.device | None = None,
) -> Outcome:
    """Run a backend on the problem of a case; see `make_problem`.

    Args:
        layer: index 0; the usual scale, and neither window nor softcap, when left out.
        device: where; None is the CPU, without the index that kernels need. The outcome is on the CPU.
    """
    layer = layer or AttentionLayer(0, config.head_dim**-0.5)
    problem = make_problem(case, config, dtype, device)
    out = problem.run(backend, layer)
    pool = problem.batch.kv_pool
    return Outcome(out.cpu(), pool.k[0].cpu(), pool.v[0].cpu())


def make_problem(
    case: Case, config: ModelConfig, dtype: torch.dtype, device: torch.device | None = None
) -> Problem:
    """Fill a case with random tensors, which depend on the case, config and dtype only.

    Args:
        device: as for `compute`.
    """
    generator = torch.Generator().manual_seed(len(case.slots))
    one_layer = msgspec.structs.replace(config, num_hidden_layers=1)
    pool = KVPool(one_layer, max(case.slots) + 1, dtype, device or CPU)
    for tensor in (pool.k[0], pool.v[0]):
        tensor.copy_(torch.empty(tensor.shape, dtype=dtype).normal_(generator=generator))
    num_q_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    shape = (sum(case.query_lens), num_q_heads + 2 * num_kv_heads, config.head_dim)
    qkv = torch.empty(shape, dtype=dtype).normal_(generator=generator).to(device or CPU)
    q, k, v = torch.split(qkv, [num_q_heads, num_kv_heads, num_kv_heads], dim=1)
    return Problem(_batch(case, pool, device), q, k, v)


def compare(
    backend: AttentionBackend,
    oracle: AttentionBackend,
    case: Case,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    layer: AttentionLayer | None = None,
    device: torch.device | None = None,
) -> str | None:
    """Run both on a case, the oracle always on the CPU; see `compute`.

    Returns:
        None if they agree, else what is wrong, in words.
    """
    try:
        got = compute(backend, case, config, dtype, layer=layer, device=device)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"  # an operation that this build of torch lacks
    expected = compute(oracle, case, config, dtype, layer=layer)
    if not torch.equal(got.k, expected.k) or not torch.equal(got.v, expected.v):
        return "keys and values are not in their slots"
    if got.out.shape != expected.out.shape or got.out.dtype != expected.out.dtype:
        shape = tuple(expected.out.shape)
        return f"the result is {tuple(got.out.shape)} {got.out.dtype}, expected {shape} {dtype}"
    error_size = (got.out.float() - expected.out.float()).abs().max().item()
    if not error_size <= TOLERANCES[dtype]:  # so that NaN fails
        return f"results differ by {error_size:.2g}; rounding explains {TOLERANCES[dtype]:.2g}"
    return None


def _batch(case: Case, pool: KVPool, device: torch.device | None) -> ForwardBatch:
    seq_lens, query_lens = np.array(case.seq_lens), np.array(case.query_lens)
    rows = np.arange(len(seq_lens))[::-1].copy()
    slot_table = np.zeros((len(seq_lens), seq_lens.max()), dtype=np.int32)
    pieces = np.split(np.array(case.slots, dtype=np.int32), np.cumsum(seq_lens)[:-1])
    for row, piece in zip(rows, pieces, strict=True):
        slot_table[row, : len(piece)] = piece
    new = [np.arange(n - c, n) for n, c in zip(case.seq_lens, case.query_lens, strict=True)]
    positions = np.concatenate(new)
    out_slots = slot_table[rows.repeat(query_lens), positions].astype(np.int64)
    index = None
    if device is not None:
        columns = (torch.from_numpy(a.astype(np.int32)).to(device) for a in (slot_table, rows, seq_lens))
        index = DeviceIndex(*columns)
    return ForwardBatch.build(
        rows=rows,
        seq_lens=seq_lens,
        query_lens=query_lens,
        positions=torch.from_numpy(positions).to(device or CPU),
        out_slots=torch.from_numpy(out_slots).to(device or CPU),
        slot_table=slot_table,
        kv_pool=pool,
        index=index,
    )
