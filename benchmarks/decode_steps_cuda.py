"""Decode steps of the whole engine on a GPU, in one process: idle share of the device, CPU time of a step.

    python benchmarks/decode_steps_cuda.py --model_dir FOLDER [--load_format dummy] [--out FILE]

Runs real scheduler, executor and worker without sockets. The idle share is one minus the time in which a
kernel or copy ran, between the first and the last of the profiled steps; CPU time is that of the whole
process (engine thread and worker thread together), whose waits sleep.
"""

import argparse
import json
import random
import time
from functools import partial
from pathlib import Path

import torch
from machine import describe_run

from lightllm.cli import parse
from lightllm.engine.core import Engine
from lightllm.engine.executor import InProcessExecutor
from lightllm.env import read_environment
from lightllm.messages import EngineRequest
from lightllm.packed_ints import pack
from lightllm.resolution import resolve
from lightllm.sampling_params import SamplingParams
from lightllm.scheduler.scheduler import Scheduler
from lightllm.server.child import settle_memory
from lightllm.server.engine_main import scheduler_config
from lightllm.server.machine import probe
from lightllm.server.model_files import describe_model, open_weights
from lightllm.worker.worker import Worker


class ListLink:
    """Hands messages in, counts tokens that come out."""

    def __init__(self) -> None:
        self.inbox: list = []
        self.num_tokens = 0

    def receive(self, timeout_s: float) -> list:
        messages, self.inbox = self.inbox, []
        return messages

    def wake(self) -> None:
        return

    def send(self, message) -> None:
        self.num_tokens += sum(len(output.new_token_ids) for output in message.outputs)


def make_engine(arguments: list[str]) -> tuple[Engine, ListLink, int]:
    machine = probe({})
    environment = read_environment({}, num_cores=machine.num_cores)
    config = resolve(parse(arguments, {}), environment, machine, None).config
    description = describe_model(config)
    config = resolve(parse(arguments, {}), environment, machine, description.config).config
    source = open_weights(description)
    load = partial(Worker.load, config, description.config, source, lambda *report: None)
    executor = InProcessExecutor(load)
    scheduler = Scheduler(scheduler_config(config, executor.info(), []), seed=1)
    link = ListLink()
    engine = Engine(scheduler, executor, link, enable_overlap=not config.engine.disable_overlap)
    return engine, link, executor.info().vocab_size


def fill(engine: Engine, link: ListLink, vocab_size: int, batch: int, length: int, params: SamplingParams):
    """Start `batch` requests and step until all of them decode and their graph is captured."""
    draw = random.Random(batch)
    for i in range(batch):
        link.inbox.append(
            EngineRequest(
                request_id=f"{batch}-{i}-{time.time()}",
                prompt_token_ids=pack(draw.randrange(100, vocab_size) for _ in range(length)),
                sampling_params=params,
            )
        )
    engine.step()
    while (
        engine.scheduler.stats().step_phase != "decode" or engine.scheduler.stats().step_batch_size != batch
    ):
        engine.step()
    for _ in range(12):
        engine.step()


def drain(engine: Engine) -> None:
    for request_id in list(engine.scheduler.requests):
        engine.scheduler.abort(request_id, "abort")
    while engine.scheduler.has_work:
        engine.step()


def busy_us(events) -> tuple[float, float]:
    """Time in which the device did something, and from its first to its last event."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type.name == "CUDA")
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy, end - spans[0][0]


def profile(engine: Engine, num_steps: int) -> dict:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(num_steps):
            engine.step()
        torch.cuda.synchronize()
    busy, span = busy_us(profiler.events())
    table = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)[:14]
    kernels = {e.key[:70]: round(e.self_device_time_total / num_steps, 1) for e in table}
    return {
        "idle_share": round(1 - busy / span, 4),
        "device_us_per_step": round(busy / num_steps, 1),
        "us_per_step_by_kernel": kernels,
    }


def time_steps(engine: Engine, link: ListLink, num_steps: int) -> dict:
    tokens, wall, cpu = link.num_tokens, time.perf_counter(), time.process_time()
    thread = time.thread_time()
    for _ in range(num_steps):
        engine.step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "step_ms": round(wall / num_steps * 1e3, 3),
        "tokens_per_s": round((link.num_tokens - tokens) / wall, 1),
        "process_cpu_ms_per_step": round(cpu / num_steps * 1e3, 3),
        "engine_thread_cpu_ms_per_step": round((time.thread_time() - thread) / num_steps * 1e3, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args, flags = parser.parse_known_args()
    engine, link, vocab_size = make_engine(flags)
    result = {**describe_run(), "device": torch.cuda.get_device_name(), "cases": {}}
    settle_memory()  # as the engine process does
    random_params = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    cases = [("1 x 512", 1, 512, {}), ("64 x 512", 64, 512, {}), ("256 x 256", 256, 256, {})]
    cases += [("256 x 256, top_p", 256, 256, random_params), ("1 x 512, top_p", 1, 512, random_params)]
    for name, batch, length, fields in cases:
        params = SamplingParams(max_new_tokens=400, ignore_eos=True, **fields)
        fill(engine, link, vocab_size, batch, length, params)
        entry = {**time_steps(engine, link, 60), **profile(engine, 30)}
        drain(engine)
        result["cases"][name] = entry
        print(name, json.dumps(entry), flush=True)
    engine.executor.close()
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
