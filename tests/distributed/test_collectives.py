"""What ranks do together: gloo against plain arithmetic, and shared memory against gloo."""

import mmap
from pathlib import Path

import pytest
import torch

from lightllm.distributed.collectives import SingleRank
from lightllm.distributed.shared_memory import SharedMemoryCollectives, memory_bytes, over_shared_memory
from tests.distributed.ranks import run_ranks
from tests.native.available import library_or_skip

WIDTHS = (5, 3, 4)
BOX_BYTES = 64  # far less than what is sent, so that it goes in several rounds


def inputs(rank: int) -> torch.Tensor:
    return torch.randn(7, 11, generator=torch.Generator().manual_seed(rank))


def results(collectives, rank: int) -> list[torch.Tensor]:
    summed = collectives.all_reduce(inputs(rank))
    columns = collectives.gather_columns(inputs(rank)[:, : WIDTHS[rank]].contiguous(), WIDTHS)
    told = torch.arange(9) * (rank + 1)
    collectives.broadcast(told)
    least = torch.tensor(collectives.smallest(10 - rank))
    return [summed, columns, told, least]


def check(found: list[list[torch.Tensor]]) -> None:
    for rank, (summed, columns, told, least) in enumerate(found):
        torch.testing.assert_close(summed, inputs(0) + inputs(1) + inputs(2))
        assert torch.equal(summed, found[0][0])
        if rank == 0:
            assert torch.equal(columns, torch.cat([inputs(r)[:, :w] for r, w in enumerate(WIDTHS)], dim=1))
        else:
            assert columns.shape == (7, 0)
        assert told.tolist() == list(range(9))
        assert least == 8


def test_gloo():
    check(run_ranks(3, lambda parallel: results(parallel.collectives, parallel.rank)))


def test_shared_memory_in_several_rounds():
    library = library_or_skip()
    memory = mmap.mmap(-1, memory_bytes(3, BOX_BYTES))

    def work(parallel):
        shared = SharedMemoryCollectives(library, memory, parallel.rank, 3, parallel.collectives, BOX_BYTES)
        return [results(shared, parallel.rank) for _ in range(20)]

    for found in zip(*run_ranks(3, work), strict=True):
        check(list(found))


def test_ranks_agree_on_the_memory_and_leave_nothing_behind(tmp_path):
    library_or_skip()

    def work(parallel):
        name = f"lightllm-test-{tmp_path.name}"
        shared = over_shared_memory(parallel.collectives, name, parallel.rank, parallel.size)
        assert isinstance(shared, SharedMemoryCollectives)
        return results(shared, parallel.rank)

    check(run_ranks(3, work))
    assert not list(Path("/dev/shm").glob("lightllm-test-*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_rank_changes_nothing(dtype):
    x = torch.ones(2, 3, dtype=dtype)
    alone = SingleRank()
    assert alone.all_reduce(x) is x
    assert alone.gather_columns(x, (3,)) is x
    alone.broadcast(x)
    assert alone.smallest(4) == 4
