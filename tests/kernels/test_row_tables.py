"""Tables of rows: diffs in, inputs out, tokens appended."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton, which is not installed here")

from lightllm.kernels import ref, row_tables


def tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(5 * 400, dtype=torch.int32, device=device).view(5, 400)
    return ids.clone(), ids + 7


def test_scatter(device: torch.device) -> None:
    table, _ = tables(device)
    expected = table.clone()
    count = 300
    places = torch.randperm(5 * 400, generator=torch.Generator().manual_seed(0))[:count].int()
    parts = [torch.full((3,), -1), places // 400, places % 400, -places, torch.full((2,), -1)]
    packed = torch.cat(parts).int().to(device)
    ref.scatter_table(expected, packed, 3, count)
    row_tables.scatter_table(table, packed, 3, count)
    assert torch.equal(table, expected)
    row_tables.scatter_table(table, packed, 0, 0)
    assert torch.equal(table, expected)


def test_gather_and_append(device: torch.device) -> None:
    token_table, slot_table = tables(device)
    rows = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(1)).int().to(device)
    positions = torch.randperm(399, generator=torch.Generator().manual_seed(2))[:300].int().to(device)
    got = torch.full((2, 3, 300), -1, device=device)
    row_tables.gather_inputs(token_table, slot_table, rows, positions, *got[0])
    ref.gather_inputs(token_table, slot_table, rows, positions, *got[1])
    assert torch.equal(got[0], got[1])
    expected = token_table.clone()
    row_tables.append_tokens(token_table, rows, positions + 1, got[0, 0] + 5)
    ref.append_tokens(expected, rows, positions + 1, got[0, 0] + 5)
    assert torch.equal(token_table, expected)
