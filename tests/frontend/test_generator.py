"""Generations over a fake engine: counts, stops, deadlines, failures; every sample ends exactly once."""

import asyncio
import ctypes
import os
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from lightllm.errors import ContextLengthError, LightLLMError, RequestError
from lightllm.frontend.generation import Generation, SampleStream
from lightllm.frontend.generator import HUGE_AT_ONCE, HUGE_CHARS, Generator
from lightllm.messages import RequestFailure
from lightllm.sampling_params import SamplingParams
from tests.fakes import EOS, FakeEngineClient, byte_tokenizer


class Recorder:
    """Notes what is emitted, by sample."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.ids: dict[int, list[int | None]] = {}
        self.reasons: dict[int, list[str | None]] = {}

    def emit(self, sample: SampleStream, token_id: int | None, text: str, logprobs: object) -> None:
        self.texts[sample.index] = self.texts.get(sample.index, "") + text
        self.ids.setdefault(sample.index, []).append(token_id)
        self.reasons.setdefault(sample.index, []).append(sample.finish_reason)


def run(
    test: Callable[[FakeEngineClient, Generator, Recorder], Awaitable[None]], reply: str = "hello"
) -> None:
    async def main() -> None:
        engine = FakeEngineClient(reply)
        await asyncio.wait_for(test(engine, Generator(byte_tokenizer(), engine), Recorder()), 10)

    asyncio.run(main())


async def finish(generation: Generation) -> None:
    await generation.finished


def test_every_token_is_emitted_once_and_the_last_one_ends() -> None:
    async def test(engine, generator, seen) -> None:
        generation = generator.start([[1, 2]], SamplingParams(max_new_tokens=9), seen.emit)
        await generation.wait_first()
        await finish(generation)
        assert seen.texts == {0: "hello"}
        assert seen.ids == {0: [*b"hello", EOS]}
        assert seen.reasons == {0: [None] * 5 + ["stop"]}
        assert (generation.num_output_tokens, generation.num_cached_tokens) == (6, 1)
        assert generator.num_live == 0

    run(test)


def test_samples_share_a_prompt_and_are_numbered() -> None:
    async def test(engine, generator, seen) -> None:
        params = SamplingParams(max_new_tokens=2, n=2)
        generation = generator.start([[1], [2]], params, seen.emit, request_id="req_x")
        await finish(generation)
        sent = [
            (r.request_id, r.sample_index, r.after_request_id, r.prompt_token_ids) for r in engine.requests
        ]
        assert sent == [
            ("req_x/0", 0, None, [1]),
            ("req_x/1", 1, "req_x/0", [1]),
            ("req_x/2", 0, None, [2]),
            ("req_x/3", 1, "req_x/2", [2]),
        ]
        assert seen.texts == dict.fromkeys(range(4), "he")

    run(test)


def test_a_stop_string_ends_the_sample_and_the_engine_hears_of_it() -> None:
    async def test(engine, generator, seen) -> None:
        params = SamplingParams(max_new_tokens=9, stop_sequences=["ll"])
        await finish(generator.start([[1]], params, seen.emit, request_id="r"))
        assert seen.texts == {0: "he"}
        assert seen.reasons[0] == [None, None, None, "stop"]
        assert engine.aborted == [("r", "stop")]
        assert engine.requests[0].sampling_params.stop_sequences == []

    run(test)


def test_stop_ids_become_text_and_special_ones_stop_ids() -> None:
    async def test(engine, generator, seen) -> None:
        params = SamplingParams(max_new_tokens=9, stop_sequences=[[108, 111], [EOS]])
        await finish(generator.start([[1]], params, seen.emit))
        assert seen.texts == {0: "hel"}
        assert engine.requests[0].sampling_params.stop_token_ids == [EOS]

    run(test)


def test_the_end_token_is_printed_only_on_request() -> None:
    async def test(engine, generator, seen) -> None:
        params = SamplingParams(max_new_tokens=9, print_eos_token=True)
        await finish(generator.start([[1]], params, seen.emit))
        assert seen.texts == {0: "hello<eos>"}

    run(test)


def test_abort_returns_the_text_so_far() -> None:
    async def test(engine, generator, seen) -> None:
        engine.resumed.clear()
        params = SamplingParams(max_new_tokens=9, stop_sequences=["ex"])
        generation = generator.start([[1]], params, seen.emit, request_id="r")
        engine.resumed.set()
        await generation.wait_first()
        await asyncio.sleep(0)
        assert generator.abort("r")
        assert not generator.abort("unknown")
        await finish(generation)
        assert seen.texts[0] == "hello"[: len(seen.ids[0]) - 1]
        assert seen.ids[0][-1] is None
        assert generation.finish_reason == "abort"
        assert engine.aborted == [("r", "abort")]

    run(test)


def test_one_failed_sample_fails_the_request_and_stops_its_siblings() -> None:
    async def test(engine, generator, seen) -> None:
        engine.failures = [RequestFailure(code="queue_full", message="full")]
        generation = generator.start([[1]], SamplingParams(max_new_tokens=9, n=3), seen.emit, request_id="r")
        with pytest.raises(LightLLMError) as caught:
            await generation.wait_first()
        assert (caught.value.code, caught.value.retry_after_s) == ("queue_full", 7)
        assert {reason for reasons in seen.reasons.values() for reason in reasons[-1:]} == {"error"}
        assert sorted(engine.aborted) == [("r/1", "abort"), ("r/2", "abort")]
        assert generator.num_live == 0

    run(test)


def test_a_silent_engine_does_not_outlive_the_deadline(monkeypatch) -> None:
    monkeypatch.setattr("lightllm.frontend.generation.DEADLINE_GRACE_S", 0.02)

    async def test(engine, generator, seen) -> None:
        engine.resumed.clear()
        generation = generator.start([[1]], SamplingParams(), seen.emit, timeout_s=0.03)
        assert engine.requests[0].deadline_s == pytest.approx(generation.arrival_unix_s + 0.03, abs=0.01)
        await finish(generation)
        assert generation.error is not None
        assert generation.error.code == "deadline"

    run(test)


def test_fail_all_ends_what_runs() -> None:
    async def test(engine, generator, seen) -> None:
        engine.resumed.clear()
        generation = generator.start([[1]], SamplingParams(), seen.emit)
        generator.fail_all("draining", "bye")
        await finish(generation)
        assert generation.error is not None
        assert generation.error.code == "draining"

    run(test)


def test_prompts_are_checked() -> None:
    async def test(engine, generator, seen) -> None:
        packed = await generator.check_prompt([0, 256] * 100, 56, "inputs")
        assert packed == array("i", [0, 256] * 100)
        with pytest.raises(ContextLengthError, match=r"200 tokens and 57 more .* 256"):
            await generator.check_prompt([0] * 200, 57, "inputs")
        for ids in ([], [-1], [257], [2**40]):
            with pytest.raises(RequestError) as caught:
                await generator.check_prompt(ids, 1, "inputs")
            assert (caught.value.code, caught.value.param) == ("out_of_range", "inputs")
        assert await generator.encode("x" * 5000) == [120] * 5000

    run(test)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_huge_texts_are_encoded_a_few_at_a_time_and_leave_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    encode, running, most = tokenizer.encode, [0], [0]

    def noted(text: str, add_special_tokens: bool = True) -> list[int]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        try:
            return encode(text, add_special_tokens)
        finally:
            running[0] -= 1

    monkeypatch.setattr(tokenizer, "encode", noted)

    async def main() -> None:
        generator = Generator(tokenizer, FakeEngineClient())
        text = "ab" * HUGE_CHARS
        before = resident_bytes()
        for ids in await asyncio.gather(*(generator.encode(text) for _ in range(4))):
            assert len(ids) == len(text)
        del ids
        assert most[0] == HUGE_AT_ONCE
        assert resident_bytes() - before < 100 * 2**20

    asyncio.run(main())
