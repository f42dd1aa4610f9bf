"""The golden rule over ranks: 2 and 3 of them generate what one does, however steps are composed.

The engine of tests/engine with a runner for each rank, in threads; every rank gets every batch, as
ProcessExecutor has it. The default model in float32 must give exactly the same tokens.
"""

import queue
import threading
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from lightllm.attention.registry import load_backend
from lightllm.device.kv_pool import KVPool
from lightllm.distributed.parallel_state import Parallel
from lightllm.layers.ops import Ops
from lightllm.messages import ScheduledBatch
from lightllm.model_config import ModelConfig
from lightllm.models import load_model, tensor_shapes
from lightllm.sampling_params import SamplingParams
from lightllm.server.model_files import describe_files, locate_model, open_tokenizer
from lightllm.weights.base import WeightSource
from lightllm.weights.dummy import DummySource
from lightllm.weights.sources import open_weights
from lightllm.worker.inputs import RowTables
from lightllm.worker.model_runner import LaunchedStep, ModelRunner, Runner
from lightllm.worker.token_choice import make_choice
from tests.distributed.ranks import run_ranks
from tests.engine.harness import LocalEngine

MAX_LEN = 320
TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=16,
    vocab_size=300,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
)
SHARED = list(range(40, 140))
PROMPTS = [[5], [7, 8, 9], list(range(10, 43)), [*SHARED, 1, 2, 3], [*SHARED, 1, 2, 4], [11] * 150]
GREEDY = SamplingParams(max_new_tokens=10, ignore_eos=True)
RANDOM = SamplingParams(
    max_new_tokens=12, ignore_eos=True, do_sample=True, temperature=1.3, top_p=0.9, seed=11
)
PENALISED = SamplingParams(
    max_new_tokens=8, ignore_eos=True, repetition_penalty=1.4, logprobs=2, prompt_logprobs=1
)
VARIANTS = {
    "overlap": {},
    "no_overlap": {"enable_overlap": False},
    "small_chunks": {"chunked_prefill_size": 17, "batch_max_tokens": 40},
    "preempting": {"num_slots": 200, "max_running": 4},
}


class RanksRunner(Runner):
    """Hands each batch to the runners of all ranks, each in a thread of its own; rank 0 answers."""

    def __init__(
        self, config: ModelConfig, source: WeightSource, size: int, num_slots: int, num_rows: int
    ) -> None:
        self.queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(size)]
        ready: Future[None] = Future()
        started = threading.Barrier(size)

        def work(parallel: Parallel) -> None:
            backend = load_backend("torch")
            model = load_model(
                config,
                source,
                dtype=torch.float32,
                backend=backend,
                ops=Ops(),
                num_threads=1,
                progress=lambda done, total: None,
                parallel=parallel,
            )
            pool = KVPool(model.config, num_slots + 1, torch.float32)
            choice = make_choice(parallel.rank, parallel.size, parallel.collectives)
            runner = ModelRunner(model, backend, pool, RowTables(num_rows, MAX_LEN), choice)
            if started.wait() == 0:
                ready.set_result(None)
            while (job := self.queues[parallel.rank].get()) is not None:
                batch, answer = job
                step = runner.launch(batch)
                if parallel.is_leader:
                    answer.set_result(step.result())

        self.thread = threading.Thread(target=run_ranks, args=(size, work), daemon=True)
        self.thread.start()
        ready.result(timeout=60)

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        answer: Future[Any] = Future()
        for jobs in self.queues:
            jobs.put((batch, answer))
        return LaunchedStep(lambda: answer.result(timeout=60))

    def close(self) -> None:
        for jobs in self.queues:
            jobs.put(None)
        self.thread.join(timeout=10)


def generate(config, source, size, prompts, params, *, is_detailed=False, **flags):
    """Token ids of all prompts; or all outputs of a single one."""
    num_slots = flags.pop("num_slots", 3000)
    runners = []

    def make_runner(num_rows: int) -> Runner:
        runners.append(RanksRunner(config, source, size, num_slots, num_rows))
        return runners[0]

    engine = LocalEngine(
        None,
        load_backend("torch"),
        None,
        num_slots=num_slots,
        max_len=MAX_LEN,
        vocab_size=config.vocab_size,
        make_runner=make_runner,
        **flags,
    )
    try:
        return engine.run_detailed(prompts[2], params) if is_detailed else engine.run(prompts, params)
    finally:
        engine.close()
        runners[0].close()


@pytest.fixture(scope="module")
def tiny() -> WeightSource:
    return DummySource(tensor_shapes(TINY), TINY.dtype, seed=3)


@pytest.fixture(scope="module")
def expected(tiny):
    return [generate(TINY, tiny, 1, PROMPTS, params) for params in (GREEDY, RANDOM)]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_generate_what_one_does(tiny, expected, size, variant):
    for params, wanted in zip((GREEDY, RANDOM), expected, strict=True):
        assert generate(TINY, tiny, size, PROMPTS, params, **VARIANTS[variant]) == wanted


def test_what_is_reported_of_tokens_is_the_same(tiny):
    expected = generate(TINY, tiny, 1, PROMPTS, PENALISED, is_detailed=True)
    got = generate(TINY, tiny, 3, PROMPTS, PENALISED, is_detailed=True)
    for ours, wanted in zip(got, expected, strict=True):
        assert ours.new_token_ids == wanted.new_token_ids
        for entries, others in (
            (ours.logprobs, wanted.logprobs),
            (ours.prompt_logprobs, wanted.prompt_logprobs),
        ):
            found = [entry.logprob for entry in entries or [] if entry]
            assert found == pytest.approx([entry.logprob for entry in others or [] if entry], abs=1e-4)
    assert got[0].prompt_logprobs is not None


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
@pytest.mark.timeout(300)
def test_the_default_model_in_float32_is_exactly_the_same():
    files = locate_model()
    config, source, tokenizer = (
        describe_files(files, {}).config,
        open_weights(files.path),
        open_tokenizer(files),
    )
    texts = ("The capital of France is", "Water boils at a temperature of", "A prime number is a number that")
    prompts = [tokenizer.encode(text) for text in texts]
    prompts.append([token for ids in prompts for token in ids] * 6)
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    expected = generate(config, source, 1, prompts, params)
    for size in (2, 3):
        assert generate(config, source, size, prompts, params) == expected
