"""Rows of KV: packed, unpacked, from slots to slots, and from an address."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton, which is not installed here")

from lightllm.kernels import kv_rows, ref

SHAPES = [
    (4, 30, 24, torch.int64),
    (2, 9, 5, torch.int32),
    (6, 40, 1, torch.int16),
    (2, 7, 3000, torch.int64),
]


def rows_of(num_tensors, num_rows, row, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(dtype)
    shape = (num_tensors, num_rows, row)
    return torch.randint(info.min, info.max, shape, dtype=dtype, generator=generator).to(device)


def slots_of(num_rows, count, device, seed):
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[:count].to(device)


@pytest.mark.parametrize(("num_tensors", "num_rows", "row", "dtype"), SHAPES)
@pytest.mark.parametrize("has_source_slots", [False, True])
@pytest.mark.parametrize("has_target_slots", [False, True])
def test_copy(device, num_tensors, num_rows, row, dtype, has_source_slots, has_target_slots) -> None:
    count = num_rows - 2
    source = rows_of(num_tensors, num_rows if has_source_slots else count, row, dtype, device)
    target = rows_of(num_tensors, num_rows + 3, row, dtype, device, seed=1)
    expected = target.clone()
    source_slots = slots_of(num_rows, count, device, 2) if has_source_slots else None
    target_slots = slots_of(num_rows + 3, count, device, 3) if has_target_slots else None
    ref.copy_rows(source, source_slots, expected, target_slots)
    kv_rows.copy_rows(source, source_slots, target, target_slots)
    assert torch.equal(target, expected)


def test_more_tiles_than_programs(device, monkeypatch) -> None:
    monkeypatch.setattr(kv_rows, "MAX_PROGRAMS", 3)
    source, target = (rows_of(5, 40, 1024, torch.int64, device, seed) for seed in (0, 1))
    expected = target.clone()
    slots = [slots_of(40, 33, device, seed) for seed in (2, 3)]
    ref.copy_rows(source, slots[0], expected, slots[1])
    kv_rows.copy_rows(source, slots[0], target, slots[1])
    assert torch.equal(target, expected)


@pytest.mark.parametrize(("num_tensors", "num_rows", "row", "dtype"), SHAPES)
def test_pull(device, num_tensors, num_rows, row, dtype) -> None:
    source = rows_of(num_tensors, num_rows, row, dtype, device)
    target = rows_of(num_tensors, num_rows + 3, row, dtype, device, seed=1)
    expected = target.clone()
    slots = slots_of(num_rows, num_rows - 2, device, 2), slots_of(num_rows + 3, num_rows - 2, device, 3)
    ref.copy_rows(source, slots[0], expected, slots[1])
    kv_rows.prepare_pull(source.data_ptr(), num_rows, row, slots[0], target, slots[1])()
    assert torch.equal(target, expected)


@pytest.mark.parametrize(("first", "count"), [(0, 2), (1, 3), (4, 1)])
def test_some_columns_of_longer_rows(device, first, count) -> None:
    source, target = (rows_of(4, 20, 5, torch.int64, device, seed) for seed in (0, 1))
    packed = torch.empty(4, 12, count, dtype=torch.int64, device=device)
    slots, others = (slots_of(20, 12, device, seed) for seed in (2, 3))
    kv_rows.copy_rows(source[:, :, first : first + count], slots, packed, None)
    assert torch.equal(packed, source[:, slots, first : first + count])
    expected = target.clone()
    expected[:, others, first : first + count] = packed
    kv_rows.copy_rows(packed, None, target[:, :, first : first + count], others)
    assert torch.equal(target, expected)
    # Straight from the columns of one memory to other columns of another.
    shorter = rows_of(4, 20, 3, torch.int64, device, seed=4)
    expected = shorter.clone()
    expected[:, others, 0] = source[:, slots, first]
    address = source.data_ptr() + first * source.element_size()
    kv_rows.prepare_pull(address, 20, 5, slots, shorter[:, :, :1], others)()
    assert torch.equal(shorter, expected)


def test_no_rows(device) -> None:
    source, target = (rows_of(2, 4, 8, torch.int64, device, seed) for seed in (0, 1))
    before = target.clone()
    none = torch.empty(0, dtype=torch.int64, device=device)
    kv_rows.copy_rows(source, none, target, none)
    assert torch.equal(target, before)


@pytest.mark.parametrize(
    ("row_bytes", "dtype"),
    [(1024, torch.int64), (20, torch.int32), (6, torch.int16), (5, torch.uint8)],
)
def test_word_type(row_bytes, dtype) -> None:
    assert kv_rows.word_type(row_bytes) == dtype
