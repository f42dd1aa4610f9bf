"""Memory of this node's processes, as the system counts it: what `/metrics` shows of them.

The supervisor of this frontend and all processes below it. Reads /proc, a few microseconds a process;
elsewhere there is nothing to show. Runs in the frontend process.
"""

import os
import re
from pathlib import Path

PROC = Path("/proc")
_MODULE = re.compile(rb"\0lightllm\.(?:server\.)?([a-z]+)(?:_main)?\0")


def resident_bytes() -> dict[str, int]:
    """Resident bytes by process: supervisor, engine, frontend, worker.

    Pages that processes share count for each of them; processes of one name are added up. Empty where this
    process is not a frontend that a supervisor has started.
    """
    if _name(os.getpid()) != "frontend":
        return {}
    supervisor = os.getppid()
    found = {"supervisor": _resident(supervisor)}
    below = _children(supervisor)
    for pid in below:
        below += _children(pid)  # the ranks are the engine's
        name = _name(pid)
        found[name] = found.get(name, 0) + _resident(pid)
    return found


def _children(pid: int) -> list[int]:
    return [int(child) for child in _read(pid, f"task/{pid}/children").split()]


def _name(pid: int) -> str:
    module = _MODULE.search(_read(pid, "cmdline"))
    return module[1].decode() if module else "other"


def _resident(pid: int) -> int:
    fields = _read(pid, "statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def _read(pid: int, name: str) -> bytes:
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:  # it has gone, or is somebody else's
        return b""
