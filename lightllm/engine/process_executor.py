"""ProcessExecutor: one worker process per rank; the engine's own process stays without torch.

Every rank gets every batch, which is a diff already, and computes it with the others; rank 0 answers for all.
Ranks say every second that they are alive. One that ends, or says nothing for SILENCE_LIMIT_S, ends the
engine: what it held is lost, and the supervisor starts a new one. Runs in the engine process, on its thread.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec
import zmq

from lightllm import messages
from lightllm.config import Config
from lightllm.engine.executor import Executor
from lightllm.engine.joint_transfers import JointTransfers
from lightllm.engine.local_ranks import LocalRanks
from lightllm.engine.machines import Machines
from lightllm.errors import BindError, ConfigError, LightLLMError, ModelLoadError, WorkerDied
from lightllm.messages import EngineInfo, ScheduledBatch, StepOutput
from lightllm.rank_messages import FromRank, RankAlive, RankFailed, RankProgress, RankReady, RankTransfers

logger = logging.getLogger(__name__)

SILENCE_LIMIT_S = 6.0
CHECK_INTERVAL_S = 0.25
# One rank's end is felt by the others at once; so long is waited for a better reason than theirs.
CAUSE_WAIT_S = 7.0

Progress = Callable[[str, int, int], None]


class StepInProcesses:
    """A step that the ranks compute."""

    def __init__(self, executor: "ProcessExecutor", step_id: int) -> None:
        self._executor, self._step_id = executor, step_id

    def result(self) -> StepOutput:
        """See Pending."""
        return self._executor.take(self._step_id)


class ProcessExecutor(Executor):
    """Starts all ranks and waits until they are ready.

    Args:
        config: with `--tp` above 1.
        directory: private (mode 0700), for addresses and for the file in which the ranks meet.
        progress: told what all ranks together have done.
        record: what must be equal on all machines, by name; not looked at with one.

    Raises:
        ConfigError, ModelLoadError, BindError, WorkerDied: what a rank could not do.
    """

    def __init__(self, config: Config, directory: Path, progress: Progress, record: dict[str, str]) -> None:
        self._context = zmq.Context(io_threads=1)
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        reply_address = f"ipc://{directory}/ranks-{os.getpid()}"
        self._inbox.bind(reply_address)
        self._decoder = messages.decoder(FromRank)
        self._progress = _JointProgress(config.parallel.tp, progress)
        self._infos: dict[int, EngineInfo] = {}
        self._outputs: dict[int, StepOutput] = {}
        self._transfers = JointTransfers(config.parallel.tp)
        self._heard_s: dict[int, float] = {}
        self._failures: dict[int, RankFailed] = {}
        self._failed_s = 0.0
        self._checked_s = time.monotonic()
        parallel = config.parallel
        self._per_machine = parallel.tp // parallel.nnodes
        self._machines = Machines(config, record, self._context, reply_address)
        self._machines.gather(lambda text: progress(text, 0, 0))
        is_alone = parallel.nnodes == 1
        self._bell_address = f"ipc://{directory}/bell-{os.getpid()}" if is_alone else ""
        meeting = f"{directory}/ranks-meet-{os.getpid()}"
        self._local = LocalRanks(
            config,
            directory,
            self._context,
            reply_address,
            meeting=meeting if is_alone else f"{parallel.nccl_host}:{parallel.nccl_port}",
            host="127.0.0.1" if is_alone else parallel.nccl_host,
            bell_address=self._bell_address,
        )
        while len(self._infos) < config.parallel.tp:
            self._receive(CHECK_INTERVAL_S)

    def watch(self, on_news: Callable[[], None]) -> bool:
        """See Executor. One has to ask all the same: other ranks may tell later than the leader answers."""
        if self._bell_address:
            bell = self._context.socket(zmq.PULL)
            bell.bind(self._bell_address)
            threading.Thread(target=_listen, args=(bell, on_news), name="bell", daemon=True).start()
        return False

    def submit(self, batch: ScheduledBatch) -> StepInProcesses:
        body = messages.encode(batch)
        self._machines.send(body)
        self._local.send(body)
        return StepInProcesses(self, batch.step_id)

    def take(self, step_id: int) -> StepOutput:
        """Wait for a step; raises WorkerDied if it will not come."""
        while step_id not in self._outputs:
            self._receive(CHECK_INTERVAL_S)
        return self._transfers.joined(self._outputs.pop(step_id))

    def info(self) -> EngineInfo:
        """The leader's; `kv_address` has the addresses of all ranks, in their order."""
        addresses = [self._infos[rank].kv_address for rank in sorted(self._infos)]
        kv_address = ",".join(addresses) if all(addresses) else ""
        return msgspec.structs.replace(self._infos[0], kv_address=kv_address)

    def check(self) -> None:
        if time.monotonic() - self._checked_s > CHECK_INTERVAL_S:
            self._receive(0.0)

    def close(self) -> None:
        self._machines.close()
        self._local.stop()
        self._inbox.close(linger=0)
        self._context.term()

    def _receive(self, timeout_s: float) -> None:
        """Take what has arrived, waiting at most so long for the first of it; then see who is missing."""
        self._inbox.poll(int(timeout_s * 1000))
        while True:
            try:
                data = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._take_message(self._decoder.decode(data))
        if time.monotonic() - self._checked_s > CHECK_INTERVAL_S:
            self._look_around()

    def _take_message(self, message: FromRank) -> None:
        match message:
            case StepOutput(step_id=step_id):
                self._outputs[step_id] = message
            case RankTransfers():
                self._transfers.note(message)
            case RankAlive(rank=rank):
                self._heard_s[rank] = time.monotonic()
            case RankReady(rank=rank, info=info):
                self._infos[rank] = info
            case RankProgress():
                self._progress.take(message)
            case RankFailed():
                self._note(message)

    def _look_around(self) -> None:
        now_s = time.monotonic()
        if now_s - self._checked_s > SILENCE_LIMIT_S / 2:
            # This process itself has been away, and what came meanwhile may not be here yet.
            self._heard_s = dict.fromkeys(self._heard_s, now_s)
        self._checked_s = now_s
        for failure in self._local.find_dead():
            self._note(failure)
        for rank, heard_s in self._heard_s.items():
            silence_s = now_s - heard_s
            if silence_s > SILENCE_LIMIT_S and rank not in self._failures:
                text = f"{self._name(rank)} has not been heard of for {silence_s:.0f} s"
                self._note(RankFailed(rank=rank, message=text))
        if self._failures and now_s - self._failed_s > CAUSE_WAIT_S:
            self._fail(next(iter(self._failures.values())))

    def _note(self, failure: RankFailed) -> None:
        if failure.is_cause:
            self._fail(failure)
        self._failed_s = self._failed_s or time.monotonic()
        self._failures.setdefault(failure.rank, failure)

    def _name(self, rank: int) -> str:
        if rank in self._local.ranks:
            return self._local.name(rank)
        return f"rank {rank} on {self._machines.name(rank // self._per_machine)}"

    def _fail(self, failure: RankFailed) -> NoReturn:
        self._local.kill()
        self._machines.close()
        kinds: dict[int, type[LightLLMError]] = {2: ConfigError, 3: ModelLoadError, 4: BindError}
        raise kinds.get(failure.exit_code, WorkerDied)(failure.message)


def _listen(bell: "zmq.Socket[bytes]", on_news: Callable[[], None]) -> None:
    """Until the executor is closed."""
    with contextlib.suppress(zmq.ContextTerminated):
        while True:
            bell.recv()
            on_news()
    bell.close(linger=0)


class _JointProgress:
    """Adds up what the ranks report, so that there is one bar for all."""

    def __init__(self, size: int, progress: Progress) -> None:
        self._size = size
        self._progress = progress
        self._stages: dict[str, dict[int, RankProgress]] = {}

    def take(self, report: RankProgress) -> None:
        ranks = self._stages.setdefault(report.stage, {})
        ranks[report.rank] = report
        done = sum(one.done for one in ranks.values())
        self._progress(report.stage, done, self._size * report.total)
