"""Sums through symmetric memory against plain ones, on two GPUs; and how a size finds its way."""

import json
import subprocess
import sys

import pytest
import torch

from lightllm.distributed.symmetric_memory import fastest_from_below
from tests.distributed.symmetric_rank import LENGTHS


def test_a_way_is_taken_up_to_where_another_is_faster():
    one_shot, two_shots, nccl = range(3)
    fastest = [one_shot, one_shot, two_shots, two_shots, nccl, two_shots]
    assert fastest_from_below(fastest, (one_shot,)) == 2
    assert fastest_from_below(fastest, (one_shot, two_shots)) == 4
    assert fastest_from_below([nccl, one_shot], (one_shot, two_shots)) == 0
    assert fastest_from_below([one_shot] * 3, (one_shot,)) == 3


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_sums_are_those_of_plain_addition_with_the_same_bits_on_both_ranks(tmp_path):
    command = [sys.executable, "-m", "tests.distributed.symmetric_rank"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            text, errors = rank.communicate(timeout=90)
            assert rank.returncode == 0, errors
            sums = [json.loads(line) for line in text.splitlines()]
            assert len(sums) == 2 * 3 * len(LENGTHS)
            wrong = [found for found in sums if found["difference"] or not found["is_leaders"]]
            assert not wrong
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
