"""Probes, on this machine and on made-up ones."""

import os
import socket

import pytest

from lightllm.server import machine


def test_probe_of_this_machine():
    found = machine.probe({})
    assert 1 <= found.num_physical_cores <= found.num_cores <= (os.cpu_count() or 1)
    assert found.num_gpus == machine.installed_gpus()
    assert 0 < machine.available_memory_bytes() <= machine.total_memory_bytes()


@pytest.mark.parametrize(
    ("variable", "installed", "visible"),
    [
        (None, 4, 4),
        ("0,1", 4, 2),
        ("2, 3", 4, 2),
        ("", 4, 0),
        ("-1", 4, 0),
        ("0,-1,1", 4, 1),
        ("0,9", 4, 1),
        ("GPU-1a,MIG-2b", 4, 2),
        ("0,1", 0, 0),
    ],
)
def test_visible_gpus(variable, installed, visible):
    assert machine.visible_gpus(variable, installed) == visible


def test_gpus_are_counted_by_their_device_nodes(tmp_path, monkeypatch):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "DEV", tmp_path)
    assert machine.installed_gpus() == 2


def test_hyper_threads_and_quota(tmp_path, monkeypatch):
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(machine, "CPU_DIR", tmp_path)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_allowed_cpus", lambda: list(range(8)))
    assert (machine.logical_cores(), machine.physical_cores()) == (8, 4)
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert (machine.logical_cores(), machine.physical_cores()) == (3, 3)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.physical_cores() == 4


def test_memory_limit_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300000\n")
    assert machine.total_memory_bytes() == 1000000
    assert machine.available_memory_bytes() == 400000


def test_port_probe():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not machine.is_port_free("127.0.0.1", taken.getsockname()[1])
    assert machine.is_port_free("127.0.0.1", 0)
    assert not machine.is_port_free("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("version", "has_triton", "obstacle"),
    [
        ("2.11.0+cpu", True, "build for CPUs"),
        ("2.11.0", False, "triton is not installed"),
        ("2.11.0", True, ""),
    ],
)
def test_what_keeps_a_gpu_from_being_used(monkeypatch, version: str, has_triton: bool, obstacle: str):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if has_triton else None)
    found = machine.gpu_obstacle()
    assert obstacle in found
    assert bool(found) == bool(obstacle)
