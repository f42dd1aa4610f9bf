"""How the CPU backend plans: which sequences it groups, and how it cuts the others into pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightllm.attention import cpu
from lightllm.attention.base import AttentionLayer
from lightllm.attention.cpu import MAX_GATHERED_LEN, MIN_VIEW_LEN, CpuAttention, Run, find_pieces, make_plan
from lightllm.attention.self_check import Case, compare
from lightllm.attention.torch_ref import TorchRefAttention
from lightllm.device.forward_batch import ForwardBatch
from lightllm.device.kv_pool import KVPool
from tests.attention.test_oracle import CONFIG


def plan(
    seq_lens: list[int], query_lens: list[int], window: int | None = None, has_softcap: bool = False
) -> cpu.Plan:
    return make_plan(batch_of(seq_lens, query_lens), window, has_softcap)


def batch_of(seq_lens: list[int], query_lens: list[int]) -> ForwardBatch:
    num_tokens = sum(query_lens)
    return ForwardBatch.build(
        rows=np.arange(len(seq_lens)),
        seq_lens=np.array(seq_lens),
        query_lens=np.array(query_lens),
        positions=torch.zeros(num_tokens, dtype=torch.int64),
        out_slots=torch.arange(num_tokens),
        slot_table=np.arange(1, 1 + len(seq_lens) * 600, dtype=np.int32).reshape(len(seq_lens), 600),
        kv_pool=KVPool(CONFIG, 1 + len(seq_lens) * 600, torch.float32),
    )


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


def test_a_window_leaves_less_to_read() -> None:
    made = plan([70, 500, 600, 30, 90, 550], [1, 1, 1, 20, 20, 1], window=40)
    assert [group.tokens.tolist() for group in made.groups] == [[0, 1, 2, 43]]
    assert made.groups[0].bias.shape == (4 * 2, 1, 40)
    assert made.groups[0].kv_rows.view(4, 2, 40)[1, 1, :2].tolist() == [
        2 * (601 + 460) + 1,
        2 * (601 + 461) + 1,
    ]
    assert [s.start for s in made.sequences] == [3]  # shorter than the window: as without one
    (masked,) = made.masked
    assert masked.keys == Run(4 * 600 + 1 + 31, 59)  # the first of the 20 sees 39 tokens before it
    assert (masked.bias == 0).sum(1).tolist() == [40] * 20


def test_windows_that_reach_everything_share_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int | None, bool]] = []
    make = make_plan

    def count(batch: ForwardBatch, window: int | None, has_softcap: bool) -> cpu.Plan:
        made.append((window, has_softcap))
        return make(batch, window, has_softcap)

    monkeypatch.setattr(cpu, "make_plan", count)
    batch = batch_of([70, 3], [1, 1])
    batch.plan = CpuAttention().plan(batch)
    q, kv = torch.zeros(2, 4, 16), torch.zeros(2, 2, 16)
    for window in (None, 70, 4096, 69, 69, None):
        CpuAttention().forward(q, kv, kv, AttentionLayer(0, 0.25, window), batch)
    assert made == [(None, False), (69, False)]


@pytest.mark.parametrize("window", [None, 50])
def test_capped_scores_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(cpu, "MAX_SCORES", 4 * 90 * 7)
    case = Case((90,), (30,), tuple(range(1, 91)))
    layer = AttentionLayer(0, 0.25, window, softcap=0.8)
    assert compare(CpuAttention(), TorchRefAttention(), case, CONFIG, torch.float32, layer=layer) is None


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
