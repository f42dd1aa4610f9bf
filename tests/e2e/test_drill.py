"""The drill of `make drill`, briefly: a smaller cluster, fewer streams, the first few troubles."""

import asyncio
from pathlib import Path

import pytest

from tests.e2e import drill

PLAN = drill.Plan(seconds=9, num_streams=16, think_s=0.5, num_prompts=12, num_prefill=1, num_decode=2)


@pytest.mark.slow
@pytest.mark.xdist_group("e2e")
@pytest.mark.timeout(240)
def test_every_request_ends_right_while_real_nodes_come_and_go(tmp_path: Path) -> None:
    result = asyncio.run(drill.run(tmp_path, PLAN))
    assert not drill.breaches(result)
    assert result["right"] > 50
    assert result["troubles"]
