"""An engine in this process: real scheduler, real worker, real codec; only the sockets are missing."""

from collections.abc import Callable

import msgspec

from lightllm import messages
from lightllm.engine.core import Engine
from lightllm.engine.executor import Executor, InProcessExecutor
from lightllm.messages import (
    EngineInfo,
    EngineOutput,
    EngineRequest,
    FromEngine,
    RequestOutput,
    ScheduledBatch,
    StepOutput,
    ToEngine,
)
from lightllm.sampling_params import SamplingParams
from lightllm.scheduler.config import SchedulerConfig
from lightllm.scheduler.scheduler import Scheduler
from lightllm.worker.inputs import RowTables
from lightllm.worker.model_runner import LaunchedStep, ModelRunner, Runner


class MemoryLink:
    """Both ends of a link in one process; every message goes through the codec."""

    def __init__(self) -> None:
        self.to_engine: list[bytes] = []
        self.outputs: list[RequestOutput] = []

    def push(self, message: ToEngine) -> None:
        self.to_engine.append(messages.encode(message))

    def receive(self, timeout_s: float) -> list[ToEngine]:
        received = [messages.decode(data, ToEngine) for data in self.to_engine]
        self.to_engine.clear()
        return received

    def send(self, message: FromEngine) -> None:
        decoded = messages.decode(messages.encode(message), FromEngine)
        if isinstance(decoded, EngineOutput):
            self.outputs += decoded.outputs

    def wake(self) -> None:
        return  # it does not wait


class RunnerWorker:
    """The part of Worker that the in-process executor calls, around a model made by the test."""

    def __init__(self, runner: Runner, info: EngineInfo) -> None:
        self.runner, self._info = runner, info

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        step = self.runner.launch(messages.decode(messages.encode(batch), ScheduledBatch))
        return LaunchedStep(lambda: messages.decode(messages.encode(step.result()), StepOutput))

    def watch(self, on_news: Callable[[], None]) -> None:
        return

    def close(self) -> None:
        return

    def info(self) -> EngineInfo:
        return self._info


class LocalEngine:
    """Runs requests to their end and returns their token ids.

    Args:
        model, backend, pool: the device tower; the pool has one slot more than `num_slots`.
        num_slots, max_len: capacity.
        make_runner: makes the runner from the number of rows; None: the one of a CPU.
        flags: fields of SchedulerConfig to override; `enable_overlap` goes to the engine.
    """

    def __init__(
        self,
        model,
        backend,
        pool,
        *,
        num_slots: int,
        max_len: int,
        vocab_size: int,
        make_runner: Callable[[int], Runner] | None = None,
        **flags,
    ) -> None:
        enable_overlap = flags.pop("enable_overlap", True)
        defaults = SchedulerConfig(
            num_slots=num_slots,
            max_running=64,
            batch_max_tokens=128,
            chunked_prefill_size=128,
            max_req_total_len=max_len,
            max_queued_requests=1024,
            schedule_policy="fcfs",
            eos_token_ids=[],
            enable_prefix_cache=True,
            enable_chunked_prefill=True,
        )
        config = msgspec.structs.replace(defaults, **flags)
        info = EngineInfo(
            device="cpu",
            dtype="float32",
            kv_total_tokens=num_slots,
            max_req_total_len=max_len,
            vocab_size=vocab_size,
            load_s=0.0,
            attention_backend=backend.name,
        )
        if make_runner is None:
            runner: Runner = ModelRunner(model, backend, pool, RowTables(config.max_running, max_len))
        else:
            runner = make_runner(config.max_running)
        worker = RunnerWorker(runner, info)
        self.executor: Executor = InProcessExecutor(lambda: worker)  # type: ignore[arg-type,return-value]
        self.link = MemoryLink()
        scheduler = Scheduler(config)
        self.engine = Engine(scheduler, self.executor, self.link, enable_overlap=enable_overlap)
        self.num_requests = 0

    @property
    def scheduler(self) -> Scheduler:
        """The one that the engine has now."""
        return self.engine.scheduler

    def run(
        self, prompts: list[list[int]], params: SamplingParams, *, at_once: bool = True
    ) -> list[list[int]]:
        """Token ids of each prompt's continuation; `at_once` False runs one prompt after the other."""
        if not at_once:
            return [self.run([prompt], params)[0] for prompt in prompts]
        ids = []
        for prompt in prompts:
            self.num_requests += 1
            ids.append(f"r{self.num_requests}")
            self.link.push(EngineRequest(request_id=ids[-1], prompt_token_ids=prompt, sampling_params=params))
        found = self.collect(set(ids))
        return [[t for output in found[i] for t in output.new_token_ids] for i in ids]

    def run_detailed(self, prompt: list[int], params: SamplingParams) -> list[RequestOutput]:
        """All outputs of one request, in order."""
        self.num_requests += 1
        request_id = f"r{self.num_requests}"
        self.link.push(EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling_params=params))
        return self.collect({request_id})[request_id]

    def collect(self, request_ids: set[str]) -> dict[str, list[RequestOutput]]:
        """Step until all of these are finished; their outputs in order."""
        found: dict[str, list[RequestOutput]] = {i: [] for i in request_ids}
        waiting = set(request_ids)
        for _ in range(100_000):
            if not waiting:
                break
            self.engine.step()
            self.scheduler.check_integrity()
            for output in self.link.outputs:
                found[output.request_id].append(output)
                if output.finish_reason is not None:
                    assert output.finish_reason in ("stop", "length"), output
                    waiting.remove(output.request_id)
            self.link.outputs.clear()
        assert not waiting
        while self.engine.pending:
            self.engine.step()
        return found

    def close(self) -> None:
        self.executor.close()
