"""Probes of this machine: cores, memory, GPUs, ports. Imports no torch and starts no driver.

Containers are honoured: CPU affinity, CPU quota and memory limit of the control group. What cannot be read
(another operating system) falls back on what Python knows. Used by the supervisor process and by `lightllm
doctor`.
"""

import importlib.metadata
import importlib.util
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from lightllm.resolution import Machine

CGROUP = Path("/sys/fs/cgroup")
CPU_DIR = Path("/sys/devices/system/cpu")
DEV = Path("/dev")


def probe(environ: Mapping[str, str]) -> Machine:
    """Find out what `resolve` needs to know."""
    num_gpus = visible_gpus(environ.get("CUDA_VISIBLE_DEVICES"), installed_gpus())
    return Machine(
        num_cores=logical_cores(),
        num_physical_cores=physical_cores(),
        num_gpus=num_gpus,
        gpu_obstacle=gpu_obstacle() if num_gpus else "",
    )


def logical_cores() -> int:
    """Count the hardware threads that this process may use."""
    return max(1, min(len(_allowed_cpus()), _quota_cores()))


def physical_cores() -> int:
    """Count the cores that this process may use, hyper-threads of one core together."""
    cores = set()
    for cpu in _allowed_cpus():
        siblings = _read(CPU_DIR / f"cpu{cpu}" / "topology" / "thread_siblings_list")
        cores.add(siblings or str(cpu))
    return max(1, min(len(cores), _quota_cores()))


def total_memory_bytes() -> int:
    """Return the RAM of the machine, or the container's limit if that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, _cgroup_bytes("memory.max", total))


def available_memory_bytes() -> int:
    """Return the RAM that can be taken without swapping, within the container's limit."""
    meminfo = re.search(r"^MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    available = int(meminfo[1]) * 1024 if meminfo else total_memory_bytes()
    limit = _cgroup_bytes("memory.max", -1)
    if limit < 0:
        return available
    return max(0, min(available, limit - _cgroup_bytes("memory.current", 0) + _reclaimable_bytes()))


def installed_gpus() -> int:
    """Count NVIDIA GPUs by their device nodes; a driver need not be loaded for that."""
    return sum(bool(re.fullmatch(r"nvidia[0-9]+", entry.name)) for entry in DEV.glob("nvidia*"))


def visible_gpus(cuda_visible_devices: str | None, num_installed: int) -> int:
    """Count the GPUs that CUDA would show: as CUDA does, the list ends at the first entry that is no GPU.

    Args:
        cuda_visible_devices: the variable; None means all. Indices or UUIDs (`GPU-...`, `MIG-...`).
        num_installed: GPUs of the machine.
    """
    if cuda_visible_devices is None or not num_installed:
        return num_installed
    count = 0
    for entry in cuda_visible_devices.split(","):
        name = entry.strip()
        is_index = name.isascii() and name.isdigit() and int(name) < num_installed
        if not is_index and not name.startswith(("GPU-", "MIG-")):
            break
        count += 1
    return count


def gpu_obstacle() -> str:
    """Say which package that a GPU needs is missing here; empty if none is."""
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "torch is not installed"
    if torch_version.endswith("+cpu"):
        return f"torch {torch_version} is a build for CPUs; install a CUDA build"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install lightllm[gpu]"
    return ""


def is_port_free(host: str, port: int) -> bool:
    """Whether a TCP server could listen there now. Binds for a moment."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe_socket:
            probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe_socket.bind(address)
    except OSError:
        return False
    return True


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _quota_cores() -> int:
    """Return the CPU quota of the control group in whole cores, rounded up; a large number without one."""
    quota, _, period = _read(CGROUP / "cpu.max").partition(" ")
    if not quota.isdigit() or not period.isdigit():
        quota, period = _read(CGROUP / "cpu/cpu.cfs_quota_us"), _read(CGROUP / "cpu/cpu.cfs_period_us")
    if not quota.isdigit() or not period.isdigit():
        return 1_000_000
    return max(1, -(-int(quota) // int(period)))


def _cgroup_bytes(name: str, default: int) -> int:
    old_names = {"memory.max": "memory.limit_in_bytes", "memory.current": "memory.usage_in_bytes"}
    text = _read(CGROUP / name) or _read(CGROUP / "memory" / old_names[name])
    return int(text) if text.isdigit() else default


def _reclaimable_bytes() -> int:
    """Return the page cache that the kernel would give back; it counts as used in the control group."""
    text = _read(CGROUP / "memory.stat") or _read(CGROUP / "memory/memory.stat")
    cached = re.search(r"^(?:total_)?inactive_file (\d+)", text, re.MULTILINE)
    return int(cached[1]) if cached else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
