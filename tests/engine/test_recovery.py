"""A step that raises ends the request at fault and no other; the others get the tokens that are theirs."""

import pytest
import torch

from lightllm.attention.registry import load_backend
from lightllm.device.kv_pool import KVPool
from lightllm.engine.recovery import MAX_FAILURES, StepFailed
from lightllm.messages import AbortRequest, EngineRequest, RequestOutput, ScheduledBatch
from lightllm.sampling_params import SamplingParams
from lightllm.worker.inputs import RowTables
from lightllm.worker.model_runner import LaunchedStep, ModelRunner, Runner
from tests.engine.harness import LocalEngine
from tests.engine.test_golden_rule import CONFIG, PROMPTS

NUM_SLOTS, MAX_LEN = 1500, 320
POISON = 299
SAMPLED = SamplingParams(max_new_tokens=12, ignore_eos=True, do_sample=True, temperature=1.5)


class Fragile(Runner):
    """Raises in every step in which a request takes part whose prompt has POISON in it, and while broken."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.poisoned: set[int] = set()
        self.num_to_break = 0

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        for new in batch.new_requests:
            self.poisoned.discard(new.row)
            if POISON in new.token_ids[: new.num_prompt_tokens]:
                self.poisoned.add(new.row)
        step = self.runner.launch(batch)
        self.num_to_break -= 1
        if self.num_to_break >= 0 or self.poisoned.intersection(batch.rows):
            raise ValueError("no such thing")
        return step


class FragileEngine(LocalEngine):
    def __init__(self, model, **flags) -> None:
        backend = load_backend("torch_ref")
        pool = KVPool(CONFIG, NUM_SLOTS + 1, torch.float32)

        def make_runner(num_rows: int) -> Runner:
            self.runner = Fragile(ModelRunner(model, backend, pool, RowTables(num_rows, MAX_LEN)))
            return self.runner

        numbers = {"num_slots": NUM_SLOTS, "max_len": MAX_LEN, "vocab_size": CONFIG.vocab_size}
        super().__init__(model, backend, pool, make_runner=make_runner, **numbers, **flags)

    def run_all(self, prompts: dict[int, list[int]]) -> dict[int, list[RequestOutput]]:
        """All outputs of the prompts by seed, sent a step apart."""
        found: dict[str, list[RequestOutput]] = {}
        for number, prompt in prompts.items():
            request = EngineRequest(
                request_id=str(number), prompt_token_ids=prompt, sampling_params=seeded(number)
            )
            self.link.push(request)
            found[request.request_id] = []
            self.engine.step()
        while self.scheduler.has_work:
            self.engine.step()
            self.scheduler.check_integrity()
        for output in self.link.outputs:
            found[output.request_id].append(output)
        self.link.outputs.clear()
        return {int(name): outputs for name, outputs in found.items()}


def seeded(seed: int) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=12, ignore_eos=True, do_sample=True, temperature=1.5, seed=seed, frequency_penalty=0.3
    )


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


@pytest.fixture(params=[True, False], ids=["overlap", "no_overlap"])
def engine(request, reference_model):
    engine = FragileEngine(reference_model, enable_overlap=request.param, max_running=6)
    yield engine
    engine.close()


def test_only_the_request_at_fault_ends(engine):
    poisoned = dict(enumerate([*PROMPTS[:3], [1, POISON], *PROMPTS[3:], [POISON] * 40]))
    healthy = {seed: prompt for seed, prompt in poisoned.items() if POISON not in prompt}
    expected = engine.run_all(healthy)
    got = engine.run_all(poisoned)
    for seed, outputs in got.items():
        assert [o.finish_reason for o in outputs].count(None) == len(outputs) - 1
        last = outputs[-1]
        if seed not in healthy:
            assert (tokens(outputs), last.finish_reason) == ([], "error")
            assert last.error is not None
            assert last.error.code == "internal"
            assert "ValueError: no such thing" in last.error.message
        else:
            assert (tokens(outputs), last.finish_reason) == (tokens(expected[seed]), "length")


def test_a_step_that_fails_for_nobodys_fault_costs_nobody_anything(engine):
    prompts = dict(enumerate(PROMPTS))
    expected = [tokens(outputs) for outputs in engine.run_all(prompts).values()]
    steps = engine.scheduler.stats().steps_total
    engine.runner.num_to_break = 1
    got = engine.run_all(prompts).values()
    assert [tokens(outputs) for outputs in got] == expected
    assert all(outputs[-1].finish_reason == "length" for outputs in got)
    assert engine.scheduler.stats().steps_total > steps  # counters go on


def test_requests_without_a_seed_keep_the_one_that_was_drawn(engine):
    request = EngineRequest(request_id="a", prompt_token_ids=[5, 6], sampling_params=SAMPLED)
    engine.link.push(request)
    engine.engine.step()
    seed = engine.scheduler.requests["a"].seed
    engine.runner.num_to_break = 1
    engine.engine.step()
    engine.engine.step()
    assert engine.scheduler.requests["a"].seed == seed
    engine.link.push(AbortRequest(request_id="a"))
    while engine.scheduler.has_work:
        engine.engine.step()


def test_when_nothing_works_the_engine_ends(engine):
    engine.runner.num_to_break = 1000
    with pytest.raises(StepFailed, match="no such thing"):
        engine.run_all(dict(enumerate(PROMPTS)))
    assert engine.runner.num_to_break > 1000 - 5 * MAX_FAILURES


def test_a_stream_of_bad_requests_does_not_end_the_engine(engine):
    for number in range(3 * MAX_FAILURES):
        outputs, healthy = engine.run_all({0: [POISON, number], 1: [number]}).values()
        assert outputs[-1].finish_reason == "error"
        assert healthy[-1].finish_reason == "length"
