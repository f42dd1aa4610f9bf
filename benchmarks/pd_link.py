"""The ways between the GPUs of two nodes, without the nodes: a plain copy, and KV by the transport alone.

Run as a program it prints the rate of the plain copy between the first two visible GPUs.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pd_parts import Entry, Sizes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEER_COPY_BYTES = 1 << 30


async def measure_link(device: str, tp: int, sizes: Sizes, log: Path, entry: Entry) -> None:
    """Plain copies between the two GPUs, and KV by the transport of the nodes, without a model.

    Args:
        tp: GPUs of a node; the second node begins behind those of the first.
        log: what the programs say on stderr.
    """
    is_cuda = device == "cuda"
    gpus = {"CUDA_VISIBLE_DEVICES": f"0,{tp}"} if is_cuda else {"OMP_NUM_THREADS": "1"}
    if is_cuda:
        try:
            entry |= json.loads(await _output([str(HERE / "pd_link.py")], gpus, log))
        except (RuntimeError, ValueError) as error:
            entry["peer_copy_error"] = str(error)
    options = ["--device", device, "--shapes", sizes.link_shape, "--lengths", str(sizes.link_tokens)]
    script = str(HERE / "kv_transfer.py")
    text = await _output([script, *options, "--lanes", sizes.link_lane, "--repeat", "5"], gpus, log)
    entry["transfers"] = json.loads(text)["transfers"]
    for one in entry["transfers"]:
        peer = entry.get("peer_copy_gb_per_s")
        if peer and "gb_per_s_median" in one:
            one["share_of_peer_copy"] = round(one["gb_per_s_median"] / peer, 3)
    if "peer_copy_error" in entry:
        raise RuntimeError(f"no plain copy: {entry['peer_copy_error']}")


async def _output(command: list[str], env: dict[str, str], log: Path) -> str:
    """Run a Python program; its stdout. Its stderr goes to the log.

    Raises:
        RuntimeError: it has failed.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": path, **env},
            start_new_session=True,
        )
        try:
            out, _ = await process.communicate()
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has ended by itself, with its own children
    if process.returncode:
        raise RuntimeError(f"{command[0]}: exit {process.returncode}: {_end_of(log)}")
    return out.decode()


def _end_of(log: Path) -> str:
    return log.read_text("utf-8", errors="replace")[-1000:]


def print_peer_copy() -> None:
    """GB/s of torch's copy from the first visible GPU to the second; runs in a process of its own."""
    import torch

    source = torch.ones(PEER_COPY_BYTES, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source, device="cuda:1")
    durations = []
    for _ in range(8):
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        began_s = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        durations.append(time.perf_counter() - began_s)
    rates = {
        "gpu": torch.cuda.get_device_name(),
        "can_access_peer": torch.cuda.can_device_access_peer(1, 0),
        "peer_copy_gb_per_s": round(PEER_COPY_BYTES / min(durations) / 1e9, 1),
    }
    print(json.dumps(rates))


if __name__ == "__main__":
    print_peer_copy()
