"""A step that raises while KV moves between two engines: it ends the request at fault, nobody else.

Two engines in this process with real KV links and a pd_master's part played by `Pair`: legs that end in
`kv_transfer_failed` are sent to the decode engine again, as the router does.
"""

import time

import msgspec
import pytest
import torch

from lightllm.attention.registry import load_backend
from lightllm.config import Config
from lightllm.device.device import CpuDevice
from lightllm.device.kv_pool import KVPool
from lightllm.messages import (
    AbortRequest,
    EngineInfo,
    EngineRequest,
    KVReserved,
    KVSource,
    KVTarget,
    KVTransfer,
    RequestOutput,
    ScheduledBatch,
)
from lightllm.sampling_params import SamplingParams
from lightllm.worker.inputs import RowTables
from lightllm.worker.kv_exchange import ExchangingRunner, open_kv_link
from lightllm.worker.model_runner import LaunchedStep, ModelRunner, Runner
from tests.engine.harness import LocalEngine, MemoryLink
from tests.engine.test_golden_rule import CONFIG
from tests.engine.test_recovery import POISON, Fragile

NUM_SLOTS, MAX_LEN, CHUNK = 3000, 320, 16
TOKEN = "0123456789abcdef0123456789abcdef"
PARAMS = SamplingParams(
    max_new_tokens=24, ignore_eos=True, do_sample=True, temperature=1.5, seed=3, frequency_penalty=0.3
)
PROMPTS = [[*range(20 * i, 20 * i + 100)] for i in range(1, 6)]
BAD = [7, 9, POISON, 11] * 20


class FullLink(MemoryLink):
    """Keeps reservations and figures, too."""

    def __init__(self) -> None:
        super().__init__()
        self.reserved: dict[str, int] = {}
        self.transfers: list[KVTransfer] = []

    def send(self, message) -> None:
        super().send(message)
        if isinstance(message, KVReserved):
            self.reserved[message.request_id] = message.num_cached_tokens
        self.transfers += getattr(message, "kv_transfers", [])


class BreaksBefore(Runner):
    """Raises in the step in which position `at` is the first, before anything of it is computed."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.at = runner, -1

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        if batch.starts == [self.at]:
            self.at = -1
            self.runner.tables.apply(batch)
            raise ValueError("nothing was computed")
        return self.runner.launch(batch)


class LateRestart(Runner):
    """What is on its way has time to arrive before the engine gives it up."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        if batch.is_restart:
            time.sleep(0.3)
        return self.runner.launch(batch)


class NodeEngine(LocalEngine):
    """One of the two; `runner` is what breaks."""

    def __init__(self, model, role: str, make_fragile=Fragile, *, num_slots: int = NUM_SLOTS) -> None:
        backend = load_backend("torch_ref")
        pool = KVPool(CONFIG, num_slots + 1, torch.float32)

        def make_runner(num_rows: int) -> Runner:
            own = ModelRunner(model, backend, pool, RowTables(num_rows, MAX_LEN))
            self.exchange = ExchangingRunner(own, CpuDevice())
            self.info = open_kv_link(
                self.exchange, _info(num_slots), _config(role), CONFIG, ("m", "t"), 0, 71 + len(role)
            )
            self.runner = self.exchange.runner = make_fragile(self.exchange.runner)
            return LateRestart(self.exchange)

        super().__init__(
            model,
            backend,
            pool,
            make_runner=make_runner,
            num_slots=num_slots,
            max_len=MAX_LEN,
            vocab_size=CONFIG.vocab_size,
            max_running=12,
            chunked_prefill_size=CHUNK,
        )
        self.link = self.engine.link = FullLink()
        self.outputs: dict[str, list[RequestOutput]] = {}

    def turn(self) -> None:
        self.engine.step()
        self.scheduler.check_integrity()
        for output in self.link.outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        self.link.outputs.clear()

    def last(self, name: str) -> RequestOutput | None:
        outputs = self.outputs.get(name)
        return outputs[-1] if outputs and outputs[-1].finish_reason is not None else None

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs.get(name, []) for token in output.new_token_ids]

    def close(self) -> None:
        self.exchange.transport.close()
        super().close()


def _info(num_slots: int) -> EngineInfo:
    return EngineInfo(
        device="cpu",
        dtype="float32",
        kv_total_tokens=num_slots,
        max_req_total_len=MAX_LEN,
        vocab_size=CONFIG.vocab_size,
        load_s=0.0,
        attention_backend="torch_ref",
    )


def _config(role: str) -> Config:
    config, replace = Config(), msgspec.structs.replace
    return replace(
        config,
        server=replace(config.server, run_mode=role),
        security=replace(config.security, cluster_token=TOKEN),
    )


class Pair:
    """Both engines, turned in one thread, and what their master would say."""

    def __init__(self, prefill: NodeEngine, decode: NodeEngine) -> None:
        self.prefill, self.decode = prefill, decode
        self.prompts: dict[str, list[int]] = {}
        self.failed: dict[str, str] = {}

    def turn_until(self, condition, limit_s: float = 30.0) -> None:
        until_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < until_s, (self.prefill.outputs, self.decode.outputs)
            for node in (self.prefill, self.decode):
                node.turn()

    def start(self, name: str, prompt: list[int]) -> None:
        """Both legs; the prefill engine begins once the other one has slots."""
        self.prompts[name] = prompt
        leg = {"prompt_token_ids": prompt, "sampling_params": PARAMS}
        source = KVSource(node_id="P", epoch=self.prefill.info.kv_epoch, ticket=f"ticket-{name:>12}")
        self.decode.link.push(EngineRequest(request_id=f"{name}d", recv_kv_from=source, **leg))
        self.turn_until(lambda: f"{name}d" in self.decode.link.reserved)
        target = KVTarget(
            node_id="D",
            epoch=self.decode.info.kv_epoch,
            address=self.decode.info.kv_address,
            ticket=source.ticket,
        )
        self.prefill.link.push(EngineRequest(request_id=f"{name}p", send_kv_to=target, **leg))

    def finish(self, *names: str) -> dict[str, list[int]]:
        """All tokens of these, by whatever way; None of them may hang or end in another error."""
        return {name: self._finish(name) for name in names}

    def _finish(self, name: str) -> list[int]:
        prefill, decode = self.prefill, self.decode

        def is_over() -> bool:
            ends = prefill.last(f"{name}p"), decode.last(f"{name}d")
            return all(ends) or any(end is not None and end.error is not None for end in ends)

        self.turn_until(is_over)
        ends = {"p": prefill.last(f"{name}p"), "d": decode.last(f"{name}d")}
        codes = [end.error.code for end in ends.values() if end is not None and end.error is not None]
        tokens = prefill.tokens(f"{name}p")
        if not codes:
            assert ends["p"] is not None
            assert ends["p"].finish_reason == "handed_over"
            return tokens + decode.tokens(f"{name}d")
        self.failed[name] = codes[0]
        for node, leg in ((prefill, "p"), (decode, "d")):
            node.link.push(AbortRequest(request_id=f"{name}{leg}"))
        if codes != ["kv_transfer_failed"] * len(codes):
            return []
        if tokens:  # else the decode engine's tokens are not passed on
            tokens += decode.tokens(f"{name}d")
        request = EngineRequest(
            request_id=f"{name}s",
            prompt_token_ids=self.prompts[name],
            output_token_ids=tokens,
            sampling_params=PARAMS,
        )
        decode.link.push(request)
        self.turn_until(lambda: decode.last(f"{name}s") is not None)
        return tokens + decode.tokens(f"{name}s")

    def check_idle(self) -> None:
        """Nothing is left on either side, in numbers that no clock can change."""
        self.turn_until(lambda: not (self.prefill.scheduler.has_work or self.decode.scheduler.has_work))
        for node in (self.prefill, self.decode):
            stats = node.scheduler.stats()
            assert (stats.kv_used_tokens, stats.requests_running, stats.requests_waiting) == (0, 0, 0)
        ends = [self.prefill.link.transfers, self.decode.link.transfers]
        for transfers in ends:
            assert len({transfer.request_id for transfer in transfers}) == len(transfers)


@pytest.fixture(scope="module")
def expected(reference_model):
    """What one engine alone says to each prompt."""
    node = NodeEngine(reference_model, "decode")
    found = []
    for i, prompt in enumerate(PROMPTS):
        node.link.push(EngineRequest(request_id=f"e{i}", prompt_token_ids=prompt, sampling_params=PARAMS))
        while node.last(f"e{i}") is None:
            node.turn()
        found.append(node.tokens(f"e{i}"))
    node.close()
    return found


@pytest.fixture
def make_pair(reference_model):
    nodes = []

    def make(**fields) -> Pair:
        nodes.extend(NodeEngine(reference_model, role, **fields) for role in ("prefill", "decode"))
        return Pair(*nodes)

    yield make
    for node in nodes:
        node.close()


def start_all(pair: Pair, prompts: list[list[int]]) -> list[str]:
    names = [f"r{i}" for i in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        pair.start(name, prompt)
    return names


def is_moving(node: NodeEngine) -> bool:
    return any(request.num_ordered_tokens for request in node.scheduler.requests.values())


def test_a_bad_prompt_on_the_prefill_engine_ends_alone(make_pair, expected):
    pair = make_pair()
    names = start_all(pair, PROMPTS)
    pair.turn_until(lambda: is_moving(pair.prefill))
    pair.start("bad", BAD)
    found = pair.finish("bad", *names)
    assert pair.failed.pop("bad") == "internal"
    assert pair.prefill.last("badp").error.message.startswith("a step of this request failed: ValueError")
    assert [found[name] for name in names] == expected
    assert set(pair.failed.values()) <= {"kv_transfer_failed"}
    pair.check_idle()
    # Transfers go on as before.
    pair.start("later", PROMPTS[0])
    assert pair.finish("later")["later"] == expected[0]
    assert "later" not in pair.failed
    pair.check_idle()


@pytest.mark.parametrize("num_turns", range(0, 12, 2))
def test_at_whatever_moment_a_step_fails_for_nobodys_fault(make_pair, expected, num_turns):
    pair = make_pair()
    names = start_all(pair, PROMPTS)
    for _ in range(num_turns):
        pair.prefill.turn()
    pair.prefill.runner.num_to_break = 1
    found = pair.finish(*names)
    assert [found[name] for name in names] == expected
    assert set(pair.failed.values()) <= {"kv_transfer_failed"}
    pair.check_idle()


def test_a_decode_engine_keeps_what_it_decodes_and_gives_up_what_it_receives(make_pair, expected):
    pair = make_pair()
    first, *rest = PROMPTS
    pair.start("r0", first)
    pair.turn_until(lambda: len(pair.decode.tokens("r0d")) > 3)
    lease = pair.decode.scheduler.requests["r0d"].lease_until_s
    for i, prompt in enumerate(rest, 1):
        pair.start(f"r{i}", prompt)
    pair.decode.link.push(EngineRequest(request_id="bad", prompt_token_ids=BAD, sampling_params=PARAMS))
    pair.turn_until(lambda: pair.decode.last("bad") is not None)
    assert pair.decode.last("bad").error.code == "internal"
    if "r0d" in pair.decode.scheduler.requests:
        assert lease <= pair.decode.scheduler.requests["r0d"].lease_until_s < lease + 60
    found = pair.finish(*(f"r{i}" for i in range(len(PROMPTS))))
    assert [found[f"r{i}"] for i in range(len(PROMPTS))] == expected
    assert set(pair.failed) == {"r1", "r2", "r3", "r4"}
    pair.check_idle()


def test_a_transfer_that_waits_for_its_turn_is_not_given_up(make_pair, expected):
    pair = make_pair()
    pair.prefill.link.push(
        EngineRequest(request_id="bad", prompt_token_ids=BAD, sampling_params=PARAMS, priority=5)
    )
    names = start_all(pair, PROMPTS)
    # The bad one fills the first step alone; those behind it have not begun.
    found = pair.finish(*names)
    assert pair.prefill.last("bad").error.code == "internal"
    assert [found[name] for name in names] == expected
    pair.check_idle()


def test_kv_of_a_step_that_was_not_computed_reaches_no_other_cache(make_pair):
    """The chunk that fails is cached at the receiver and not sent; the next one builds on it."""
    pair = make_pair(make_fragile=BreaksBefore)
    prompt = PROMPTS[0][: 3 * CHUNK + 10]
    warm = EngineRequest(request_id="warm", prompt_token_ids=prompt[: 3 * CHUNK], sampling_params=PARAMS)
    pair.decode.link.push(warm)
    pair.turn_until(lambda: pair.decode.last("warm") is not None)
    pair.prefill.runner.at = 2 * CHUNK
    pair.start("r0", prompt)
    assert pair.decode.link.reserved["r0d"] == 3 * CHUNK
    found = pair.finish("r0")["r0"]
    assert "r0" in pair.failed
    pair.start("again", prompt)
    assert pair.finish("again")["again"] == found
    assert "again" not in pair.failed
    alone = EngineRequest(request_id="alone", prompt_token_ids=prompt, sampling_params=PARAMS)
    pair.prefill.link.push(alone)
    pair.turn_until(lambda: pair.prefill.last("alone") is not None)
    assert pair.prefill.tokens("alone") == found
    pair.check_idle()
