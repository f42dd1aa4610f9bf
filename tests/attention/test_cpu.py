"""How the CPU backend plans: which sequences it groups, and how it cuts the others into pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightllm.attention import cpu
from lightllm.attention.cpu import MAX_GATHERED_LEN, MIN_VIEW_LEN, CpuAttention, Run, find_pieces
from lightllm.device.forward_batch import ForwardBatch
from lightllm.device.kv_pool import KVPool
from lightllm.model_config import ModelConfig

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=8,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
)


def plan(seq_lens: list[int], query_lens: list[int]) -> cpu.Plan:
    num_tokens = sum(query_lens)
    batch = ForwardBatch.build(
        rows=np.arange(len(seq_lens)),
        seq_lens=np.array(seq_lens),
        query_lens=np.array(query_lens),
        positions=torch.zeros(num_tokens, dtype=torch.int64),
        out_slots=torch.arange(num_tokens),
        slot_table=np.arange(1, 1 + len(seq_lens) * 600, dtype=np.int32).reshape(len(seq_lens), 600),
        kv_pool=KVPool(CONFIG, 1 + len(seq_lens) * 600, torch.float32),
    )
    return CpuAttention().plan(batch)


def test_short_decodes_of_like_length_are_grouped() -> None:
    made = plan([70, 3, 100, 128, 129, MAX_GATHERED_LEN + 1, 20], [1, 1, 1, 1, 1, 1, 20])
    assert [group.tokens.tolist() for group in made.groups] == [[0, 2, 3]]
    assert made.groups[0].bias.shape == (3 * 2, 1, 128)
    assert [s.start for s in made.sequences] == [1, 4, 5, 6]
    assert [s.is_chunk for s in made.sequences] == [False, False, False, True]


def test_groups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MAX_GATHERED_ELEMENTS", 3 * 64 * 2 * 16)
    made = plan([60] * 7, [1] * 7)
    assert [group.tokens.tolist() for group in made.groups] == [[0, 1, 2], [3, 4, 5]]
    assert [s.start for s in made.sequences] == [6]


def pieces(*parts: tuple[int, int]) -> tuple[Run | torch.Tensor, ...]:
    return find_pieces(np.concatenate([np.arange(s, s + n, dtype=np.int32) for s, n in parts]))


def test_nothing() -> None:
    assert find_pieces(np.empty(0, dtype=np.int32)) == ()


@pytest.mark.parametrize("length", [1, 5, MIN_VIEW_LEN, 1000])
def test_one_run_is_read_in_place(length: int) -> None:
    assert pieces((7, length)) == (Run(7, length),)


def test_one_short_run_beside_long_ones_is_read_in_place() -> None:
    assert pieces((400, MIN_VIEW_LEN), (1, 3)) == (Run(400, MIN_VIEW_LEN), Run(1, 3))


def test_short_runs_are_gathered_together() -> None:
    run, gathered = pieces((1, 2), (400, MIN_VIEW_LEN), (10, 3))
    assert run == Run(400, MIN_VIEW_LEN)
    assert isinstance(gathered, torch.Tensor)
    assert gathered.tolist() == [1, 2, 10, 11, 12]


@given(st.lists(st.tuples(st.integers(1, 600), st.booleans()), min_size=1, max_size=8))
def test_pieces_cover_every_slot_once(parts: list[tuple[int, bool]]) -> None:
    slots: list[int] = []
    start = 1
    for length, leaves_gap in parts:
        slots += range(start, start + length)
        start += length + leaves_gap
    found: list[int] = []
    for piece in find_pieces(np.array(slots, dtype=np.int32)):
        found += range(piece.start, piece.start + piece.length) if isinstance(piece, Run) else piece.tolist()
    assert sorted(found) == slots
