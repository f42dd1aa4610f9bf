"""The table of benchmarks/pd_cluster.py, made of figures that the benchmarks have written."""

import json
from pathlib import Path

import pytest

from benchmarks.pd_table import table

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def kept(name):
    return json.loads((RESULTS / name).read_text("utf-8"))


def test_each_way_of_kv_has_its_line():
    link = kept("kv_transfer_h200x2.json")
    lines = table({"results": {"gpus": {"link": link}}})
    for one in link["transfers"]:
        what = (
            f"KV by {one['lane']} alone, {one['at_once']} x {one['tokens']} {one['slots']}, {one['ordered']}"
        )
        shown = [line for line in lines if line.startswith(what) and f"{one['ms_median']:.1f} ms" in line]
        assert shown, what
        assert any("GB/s" in line for line in shown) == ("gb_per_s_median" in one)


@pytest.mark.parametrize("name", ["pd_cluster_h200x2", "pd_tp2_shared_h200x2", "pd_one_gpu_h200"])
def test_kept_runs_can_be_shown(name):
    found = kept(f"{name}.json")
    runs = [found] if "results" in found else [run for run in found.values() if isinstance(run, dict)]
    assert runs
    for run in runs:
        lines = table(run)
        for length in ("512", "8000"):
            shown_ms = f"{run['results']['pd']['ttft'][length]['p50_ms']:.1f} ms"
            assert any(line.startswith(f"TTFT p50, {length} tokens") and shown_ms in line for line in lines)
