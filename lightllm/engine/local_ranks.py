"""LocalRanks: the worker processes of this machine, started, fed and watched by whoever owns them.

The owner is the engine, or on the other machines of a node the process that serves no HTTP. Each worker is
`python -m lightllm.worker` with its configuration on stdin; it lives as long as that pipe. Imports no torch.
"""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import zmq

from lightllm import messages
from lightllm.config import Config, encode_config
from lightllm.rank_messages import RankFailed, WorkerConfig

EXIT_GRACE_S = 3.0
LENGTH = struct.Struct("<I")


class LocalRanks:
    """All ranks of this machine.

    Args:
        config: of the node.
        directory: private (mode 0700), for the ipc addresses.
        context: of zmq.
        reply_address: where the ranks push what they have to say.
        meeting, host, bell_address: see WorkerConfig.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        context: "zmq.Context[zmq.Socket[bytes]]",
        reply_address: str,
        *,
        meeting: str,
        host: str,
        bell_address: str = "",
    ) -> None:
        size = config.parallel.tp // config.parallel.nnodes
        first = config.parallel.node_rank * size
        self.ranks = range(first, first + size)
        self._machine = socket.gethostname()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        encoded = encode_config(config)
        for local_rank, rank in enumerate(self.ranks):
            address = f"ipc://{directory}/rank-{rank}-{os.getpid()}"
            outbox = context.socket(zmq.PUSH)
            outbox.setsockopt(zmq.SNDHWM, 0)
            outbox.setsockopt(zmq.LINGER, 0)
            outbox.bind(address)
            self._sockets.append(outbox)
            self._processes[rank] = _start(
                WorkerConfig(
                    config=encoded,
                    rank=rank,
                    local_rank=local_rank,
                    local_size=size,
                    address=address,
                    reply_address=reply_address,
                    meeting=meeting,
                    host=host,
                    bell_address=bell_address,
                )
            )

    def send(self, batch: bytes) -> None:
        """Hand an encoded batch to every rank; never waits."""
        for outbox in self._sockets:
            with contextlib.suppress(zmq.Again):  # nobody is there any more, which `find_dead` tells
                outbox.send(batch, zmq.NOBLOCK)

    def name(self, rank: int) -> str:
        """Which rank, where, for messages."""
        return f"rank {rank} on {self._machine} (process {self._processes[rank].pid})"

    def find_dead(self) -> list[RankFailed]:
        """Last words for ranks whose processes have ended."""
        found = []
        for rank, process in self._processes.items():
            code = process.poll()
            if code is not None:
                how = (
                    f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
                )
                found.append(RankFailed(rank=rank, message=f"{self.name(rank)} {how}", is_cause=code < 0))
        return found

    def stop(self) -> None:
        """Ask all to leave, and end those that do not."""
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()
        end = time.monotonic() + EXIT_GRACE_S
        while any(process.poll() is None for process in self._processes.values()) and time.monotonic() < end:
            time.sleep(0.02)
        self.kill()

    def kill(self) -> None:
        """End all at once; the frozen ones too."""
        for process in self._processes.values():
            process.kill()
            process.wait()
        for outbox in self._sockets:
            outbox.close(linger=0)


def _start(worker: WorkerConfig) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-m", "lightllm.worker"], stdin=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    data = messages.encode(worker)
    try:
        process.stdin.write(LENGTH.pack(len(data)) + data)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended already, which its owner will see
    return process
