"""Facts about the CPU, and settings of the process."""

from pathlib import Path

import pytest
import torch

from lightllm.device import device

AVX2 = frozenset({"avx2", "fma"})
AMX = AVX2 | {"avx512_bf16", "amx_bf16"}


@pytest.mark.parametrize(
    ("asked", "checkpoint", "flags", "dtype", "reason"),
    [
        ("auto", "float32", AVX2, torch.float32, "of the checkpoint"),
        ("auto", "bfloat16", AVX2, torch.float32, "emulates"),
        ("auto", "bfloat16", AMX, torch.bfloat16, "of the checkpoint"),
        ("auto", "float16", AMX, torch.float32, "emulates"),
        ("bfloat16", "float32", AVX2, torch.bfloat16, "slow"),
        ("float32", "bfloat16", AMX, torch.float32, "as asked"),
    ],
)
def test_choose_dtype(
    asked: str, checkpoint: str, flags: frozenset[str], dtype: torch.dtype, reason: str
) -> None:
    chosen, why = device.choose_dtype(asked, checkpoint, flags)
    assert chosen == dtype
    assert reason in why


@pytest.mark.parametrize("key", ["flags\t\t", "Features\t"])
def test_cpu_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{key}: fpu bf16 avx2\n\nprocessor\t: 1\n{key}: fpu bf16 avx2\n")
    monkeypatch.setattr(device, "CPUINFO", cpuinfo)
    assert device.cpu_flags() == {"fpu", "bf16", "avx2"}


def test_cpu_flags_of_an_unknown_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "absent")
    assert device.cpu_flags() == frozenset()


def test_free_memory_is_what_the_system_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       2000 kB\nMemAvailable:   1000 kB\n")
    monkeypatch.setattr(device, "MEMINFO", meminfo)
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    assert device.free_memory_bytes() == 1000 * 1024


@pytest.mark.parametrize(("limit", "expected"), [("max", 1_024_000), ("500000", 350_000), ("100000", 0)])
def test_free_memory_honours_the_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, expected: int
) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable:   1000 kB\n")
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("200000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    monkeypatch.setattr(device, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    assert device.free_memory_bytes() == expected


def test_set_threads() -> None:
    before = torch.get_num_threads()
    try:
        assert device.set_threads(2) == 2
        assert device.set_threads(0) == 2
    finally:
        torch.set_num_threads(before)
