"""The golden rule on the device runner: the same tokens as the CPU's runner, however steps are composed.

Without a GPU a few tokens run through the interpreted kernels; with one, every variant of the CPU's test,
with and without graphs.
"""

import msgspec
import pytest
import torch

pytest.importorskip("triton", reason="the device runner needs triton, which is not installed here")

from lightllm.attention import triton_gqa
from lightllm.attention.registry import load_backend
from lightllm.device.base import Device, make_device
from lightllm.device.kv_pool import KVPool
from lightllm.layers.triton_ops import TritonOps
from lightllm.messages import KVTarget, KVTransferOrder, ScheduledBatch
from lightllm.models import load_model, tensor_shapes
from lightllm.sampling_params import SamplingParams
from lightllm.weights.dummy import DummySource
from lightllm.worker.cuda_graph import GraphMemory
from lightllm.worker.decode_graphs import DecodeGraphs
from lightllm.worker.device_runner import DeviceRunner
from lightllm.worker.device_tables import DeviceTables
from lightllm.worker.model_runner import LaunchedStep
from lightllm.worker.prompt_graphs import PromptGraphs
from tests.engine.harness import LocalEngine
from tests.engine.test_golden_rule import (
    CONFIG,
    EPSILON,
    GREEDY,
    NUM_SLOTS,
    PROMPTS,
    RANDOM,
    VARIANTS,
    build,
    oracle,
    run,
)
from tests.engine.test_golden_rule import engine_of as cpu_engine_of

__all__ = ["oracle"]
MAX_LEN = 320
SIZES = [1, 2, 4, 8, 16]
PROMPT_SIZES = [64, 128, 192, 256]
GRAPHS = {"no_graphs": None, "eager_padded": False, "graphs": True}
MANY_FIELDS = SamplingParams(
    max_new_tokens=12,
    ignore_eos=True,
    do_sample=True,
    temperature=1.4,
    top_k=30,
    top_p=0.95,
    min_p=0.01,
    seed=5,
    repetition_penalty=1.3,
    frequency_penalty=0.4,
    presence_penalty=0.3,
    logit_bias={7: 2.0},
    logprobs=3,
)


@pytest.fixture(scope="module", params=["torch", "native"])
def model(request):
    """What computes on the CPU, with the weights as they are."""
    return build(request.param)


@pytest.fixture(scope="module")
def device() -> Device:
    return make_device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def device_model(device: Device):
    backend = load_backend("triton", config=CONFIG)
    return load_model(
        CONFIG,
        DummySource(tensor_shapes(CONFIG), CONFIG.dtype, seed=3),
        dtype=torch.float32,
        device=device.torch_device,
        backend=backend,
        ops=TritonOps(),
        num_threads=1,
        progress=lambda done, total: None,
    )


def engine_of(model, device: Device, capture: bool | None = None, **flags) -> LocalEngine:
    """An engine on the device; `capture`: None without graphs, False padded but eager, True captured."""
    num_slots = flags.pop("num_slots", NUM_SLOTS)
    pool = KVPool(CONFIG, num_slots + 1, torch.float32, device.torch_device)

    def make_runner(max_rows: int) -> DeviceRunner:
        tables = DeviceTables(max_rows, MAX_LEN, device)
        if capture is None:
            return DeviceRunner(model, model.backend, pool, tables, device, None)
        parts, memory = (model, model.backend, pool, tables), GraphMemory()
        decode = DecodeGraphs(*parts, memory, sizes=SIZES, max_len=MAX_LEN, enable_capture=capture)
        prompt = PromptGraphs(*parts, device, memory, sizes=PROMPT_SIZES, enable_capture=capture)
        return DeviceRunner(*parts, device, decode, prompt_graphs=prompt)

    return LocalEngine(
        model,
        model.backend,
        pool,
        num_slots=num_slots,
        max_len=MAX_LEN,
        vocab_size=CONFIG.vocab_size,
        make_runner=make_runner,
        **flags,
    )


def run_on(model, device: Device, prompts, params, capture: bool | None = None, **flags):
    engine = engine_of(model, device, capture, **flags)
    try:
        return engine.run(prompts, params)
    finally:
        engine.close()


@pytest.fixture
def few_programs(monkeypatch, device: Device) -> None:
    """The interpreter runs programs one after the other."""
    if device.name == "cpu":
        monkeypatch.setattr(triton_gqa, "TARGET_PROGRAMS", 8)


@pytest.mark.usefixtures("few_programs")
def test_kv_that_is_sent_is_written_when_the_step_says_so(monkeypatch, device_model, device: Device) -> None:
    launch, seen = DeviceRunner.launch, []
    target = KVTarget(node_id="D", epoch=1, address="tcp://127.0.0.1:1", ticket="t")
    order = KVTransferOrder(request_id="s", start=0, slots=[1], target=target)

    def sending(runner: DeviceRunner, batch: ScheduledBatch) -> LaunchedStep:
        is_prompt = bool(batch.rows) and max(batch.num_new_tokens) > 1
        step = launch(runner, msgspec.structs.replace(batch, kv_sends=[order]) if is_prompt else batch)
        if step.kv_written is not None:
            step.kv_written.wait()
            with device.side_queue():  # beside what is left of the step
                written = runner.kv_pool.storage.view(torch.int32).clone()
        device.synchronize()
        assert (step.kv_written is not None) == is_prompt
        if is_prompt:
            seen.append(torch.equal(written, runner.kv_pool.storage.view(torch.int32)))
        return step

    monkeypatch.setattr(DeviceRunner, "launch", sending)
    run_on(device_model, device, PROMPTS[:2], msgspec.structs.replace(GREEDY, max_new_tokens=2))
    assert seen
    assert all(seen)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("capture", [None, False], ids=["no_graphs", "eager_padded"])
@pytest.mark.parametrize("params", [GREEDY, MANY_FIELDS], ids=["greedy", "many_fields"])
def test_few_tokens_are_those_of_the_cpu(model, device_model, device: Device, params, capture) -> None:
    short = msgspec.structs.replace(params, max_new_tokens=3)
    engine = cpu_engine_of(model)
    expected = engine.run_detailed(PROMPTS[1], short), engine.run(PROMPTS[:2], short)
    engine.close()
    engine = engine_of(device_model, device, capture)
    got = engine.run_detailed(PROMPTS[1], short), engine.run(PROMPTS[:2], short)
    engine.close()
    assert got[1] == expected[1]
    for mine, theirs in zip(got[0], expected[0], strict=True):
        for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert a.top_ids == b.top_ids
            assert a.top_logprobs == pytest.approx(b.top_logprobs, abs=1e-4)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_prompt_logprobs(model, device_model, device: Device) -> None:
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=1)
    found = []
    for engine in (cpu_engine_of(model), engine_of(device_model, device)):
        (output,) = engine.run_detailed(PROMPTS[1], params)
        found.append([entry and entry.logprob for entry in output.prompt_logprobs])
        engine.close()
    assert found[0][0] is found[1][0] is None
    assert found[1][1:] == pytest.approx(found[0][1:], abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("capture", GRAPHS.values(), ids=GRAPHS.keys())
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_those_of_the_oracle(oracle, device_model, device: Device, variant, capture) -> None:
    expected, gaps = oracle
    got = run_on(device_model, device, PROMPTS, GREEDY, capture, **VARIANTS[variant])
    for tokens, wanted, gap in zip(got, expected, gaps, strict=True):
        assert len(tokens) == len(wanted)
        for position, (a, b) in enumerate(zip(tokens, wanted, strict=True)):
            if a != b:
                assert gap[position] < EPSILON, (variant, position, tokens, wanted)
                break


@pytest.mark.gpu
@pytest.mark.parametrize("params", [GREEDY, RANDOM, MANY_FIELDS], ids=["greedy", "random", "many_fields"])
def test_equal_shapes_give_equal_tokens(device_model, device: Device, params) -> None:
    eager = run_on(device_model, device, PROMPTS, params, False)
    assert run_on(device_model, device, PROMPTS, params, True) == eager
    assert run_on(device_model, device, PROMPTS, params, True, enable_overlap=False) == eager


@pytest.mark.gpu
@pytest.mark.parametrize("params", [RANDOM, MANY_FIELDS], ids=["random", "many_fields"])
def test_random_tokens_are_those_of_the_cpu(model, device_model, device: Device, params) -> None:
    got, expected = run_on(device_model, device, PROMPTS, params, True), run(model, params)
    differing = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]
    assert len(differing) <= 1, differing  # noise that falls between two tokens, up to rounding


@pytest.mark.gpu
def test_graphs_are_captured_and_used(device_model, device: Device) -> None:
    engine = engine_of(device_model, device, True)
    engine.run(PROMPTS, GREEDY)
    runner = engine.executor._worker.runner  # type: ignore[attr-defined]
    engine.close()
    assert 8 in runner.graphs.graphs
    assert runner.prompt_graphs.graphs
