"""One rank as a process: assembles its worker, takes batches, and lets its owner know that it is alive.

Started as `python -m lightllm.worker` by engine/local_ranks.py. The rank's first failure becomes one readable
line. A rank ends with the process that started it, even when it is frozen.
"""

import contextlib
import ctypes
import logging
import os
import queue
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from lightllm import messages
from lightllm.config import Config, decode_config
from lightllm.engine.machine_link import listen_on
from lightllm.errors import LightLLMError, WorkerDied
from lightllm.logs import setup_logging
from lightllm.messages import ScheduledBatch
from lightllm.rank_messages import (
    FromRank,
    RankAlive,
    RankFailed,
    RankProgress,
    RankReady,
    RankTransfers,
    WorkerConfig,
)
from lightllm.server.child import Parent, read_frame, settle_memory
from lightllm.server.fingerprint import model_fingerprint, tokenizer_fingerprint
from lightllm.server.model_files import describe_model, open_weights, tokenizer_files

if TYPE_CHECKING:
    from lightllm.device.base import Device
    from lightllm.distributed.collectives import Collectives
    from lightllm.distributed.parallel_state import Parallel
    from lightllm.worker.model_runner import LaunchedStep
    from lightllm.worker.worker import Worker

logger = logging.getLogger(__name__)

ALIVE_INTERVAL_S = 1.0
LINGER_MS = 1000
PR_SET_PDEATHSIG = 1


def main() -> int:
    """Compute batches until the owner goes or a step fails; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C on the terminal is the supervisor's business
    die_with_parent()
    parent = Parent()
    worker: WorkerConfig | None = read_frame(0, WorkerConfig)
    if worker is None:
        return 1  # the owner has already gone
    config = decode_config(worker.config)
    setup_logging(config.observability.log_format, config.observability.log_level, f"worker-{worker.rank}")
    parent.watch(lambda message: None, lambda: os._exit(0))
    context = zmq.Context(io_threads=1)
    outbox = Outbox(context, worker.reply_address)
    try:
        _serve(config, worker, context, outbox)
    except WorkerDied as error:
        outbox.send(RankFailed(rank=worker.rank, message=error.message, is_cause=False))
    except LightLLMError as error:
        outbox.send(RankFailed(rank=worker.rank, message=error.message, exit_code=error.exit_code))
    except Exception as error:
        logger.exception("rank %d failed", worker.rank)
        outbox.send(RankFailed(rank=worker.rank, message=f"rank {worker.rank}: {_words(error)}"))
    outbox.close()
    return 1


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends (Linux)."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):
        logger.debug("no prctl here: the end of stdin alone tells that the owner has gone")


class Outbox:
    """What this rank says; any thread may send."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(address)
        self._lock = threading.Lock()

    def send(self, message: FromRank) -> None:
        with self._lock:
            self._socket.send(messages.encode(message), zmq.NOBLOCK)

    def ring(self) -> None:
        """Send an empty message, if somebody is there."""
        with self._lock, contextlib.suppress(zmq.Again):
            self._socket.send(b"", zmq.NOBLOCK)

    def close(self) -> None:
        """Let what was sent last leave."""
        with self._lock:
            self._socket.close(linger=LINGER_MS)


def _serve(
    config: Config, place: WorkerConfig, context: "zmq.Context[zmq.Socket[bytes]]", outbox: Outbox
) -> None:
    inbox = context.socket(zmq.PULL)
    inbox.setsockopt(zmq.RCVHWM, 0)
    inbox.connect(place.address)
    decoder = messages.decoder(ScheduledBatch)
    worker = _load(config, place, outbox)
    if place.bell_address:
        worker.watch(Outbox(context, place.bell_address).ring)
    settle_memory()
    outbox.send(RankReady(rank=place.rank, info=worker.info()))
    answers = Answers(outbox, place.rank)
    while True:
        answers.put(worker.launch(decoder.decode(inbox.recv())))


def _load(config: Config, place: WorkerConfig, outbox: Outbox) -> "Worker":
    description = describe_model(config)
    outbox.send(RankProgress(rank=place.rank, stage="importing torch"))
    from lightllm.device.base import make_device
    from lightllm.worker.worker import Worker

    # From here on Python's lock is free often enough for a heartbeat.
    threading.Thread(target=_beat, args=(outbox, place.rank), name="alive", daemon=True).start()
    device = make_device(config.engine.device, place.local_rank)
    parallel = _join(config, place, device)

    def report(stage: str, done: int, total: int) -> None:
        outbox.send(RankProgress(rank=place.rank, stage=stage, done=done, total=total))

    source = open_weights(description)
    worker = Worker.load(config, description.config, source, report, device=device, parallel=parallel)
    if config.moves_kv:
        hashes = model_fingerprint(description), tokenizer_fingerprint(tokenizer_files(config))
        worker.open_kv_link(config, description.config, hashes, parallel)
    return worker


def _join(config: Config, place: WorkerConfig, device: "Device") -> "Parallel":
    from lightllm.distributed.collectives import connect, file_store, tcp_store
    from lightllm.distributed.parallel_state import Parallel
    from lightllm.distributed.shared_memory import over_shared_memory
    from lightllm.distributed.symmetric_memory import over_symmetric_memory

    size = config.parallel.tp
    if config.parallel.nnodes == 1:
        store = file_store(Path(place.meeting), size)
    else:
        host, _, port = place.meeting.rpartition(":")
        # Bound to that address only; torch would listen on all.
        fd = listen_on(host, int(port), "--nccl_port").detach() if place.rank == 0 else None
        store = tcp_store(host, int(port), size, fd)
    torch_group = connect(store, place.rank, size, place.host, device.torch_device)
    collectives: Collectives = torch_group
    if config.parallel.nnodes == 1 and device.name == "cpu":
        # The folder of the meeting has a random name of its own.
        name = "-".join(Path(place.meeting).parts[-2:])
        collectives = over_shared_memory(torch_group, name, place.rank, size)
    elif config.parallel.nnodes == 1:
        collectives = over_symmetric_memory(torch_group, store)
    return Parallel(place.rank, size, place.local_rank, place.local_size, collectives)


def _beat(outbox: Outbox, rank: int) -> None:
    while True:
        outbox.send(RankAlive(rank=rank))
        time.sleep(ALIVE_INTERVAL_S)


class Answers:
    """Sends what steps brought in their order, from a thread that may wait for the device.

    The leader sends all of it. The others' tokens are the leader's; what they alone know is how far their
    part of a KV transfer is.
    """

    def __init__(self, outbox: Outbox, rank: int) -> None:
        self._outbox, self._rank = outbox, rank
        self._steps: queue.SimpleQueue[LaunchedStep] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="answers", daemon=True).start()

    def put(self, step: "LaunchedStep") -> None:
        """Queue a launched step."""
        self._steps.put(step)

    def _run(self) -> None:
        while True:
            step = self._steps.get()
            try:
                output = step.result()
            except Exception as error:  # the process cannot go on, whatever it was
                logger.exception("rank %d failed", self._rank)
                self._outbox.send(RankFailed(rank=self._rank, message=f"rank {self._rank}: {_words(error)}"))
                self._outbox.close()
                os._exit(1)
            if self._rank == 0:
                self._outbox.send(output)
            elif output.kv_sent or output.kv_received or output.kv_failed:
                self._outbox.send(
                    RankTransfers(
                        rank=self._rank,
                        kv_sent=output.kv_sent,
                        kv_received=output.kv_received,
                        kv_failed=output.kv_failed,
                        kv_transfers=output.kv_transfers,
                    )
                )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
