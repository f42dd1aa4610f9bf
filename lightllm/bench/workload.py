"""What is sent: random prompts of an exact token length, and the output lengths asked for.

The same seed and tokenizer give the same prompts and lengths, in whatever order they are made. A codec says
how the server will count a text: a tokenizer loaded here, or the server's own /tokenize and /detokenize.
Knows nothing of timing or of generation routes.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from lightllm.bench.http_client import CallFailed, HttpClient
from lightllm.errors import LightLLMError

# Lower ids are special tokens and single bytes in most vocabularies; the range is that of LightLLM's script.
LOWEST_ID, HIGHEST_ID = 512, 8192
FILLERS = (" the", " of", " and", " to", " in", " a", " for", " on")
MAX_ATTEMPTS = 64
NUM_PARALLEL_PROMPTS = 16


class WorkloadError(LightLLMError):
    """Prompts as asked for cannot be made."""


class Job(msgspec.Struct, frozen=True, order=True):
    """One request to send: its text and the exact number of output tokens asked for."""

    index: int
    prompt: str
    output_len: int


class Tokenizer(Protocol):
    """The part of a loaded tokenizer that prompts need."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def apply_chat_template(self, messages: list[dict[str, Any]], **kwargs: Any) -> str: ...


class TextCodec(Protocol):
    """Turns ids into text and back as the server does."""

    async def id_range(self) -> tuple[int, int]:
        """Lowest id and the one behind the highest that random prompts draw from."""
        ...

    async def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without special tokens."""
        ...

    async def decode(self, ids: list[int]) -> str:
        """Text of the ids, without special tokens."""
        ...

    async def count(self, text: str) -> int:
        """Prompt tokens of a request with this text, special tokens and chat template included."""
        ...


class LocalCodec:
    """Counts with a tokenizer loaded in this process."""

    def __init__(self, tokenizer: Tokenizer, *, is_chat: bool) -> None:
        self._tokenizer = tokenizer
        self._is_chat = is_chat

    async def id_range(self) -> tuple[int, int]:
        high = min(HIGHEST_ID, self._tokenizer.vocab_size)
        return min(LOWEST_ID, high // 4), high

    async def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    async def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    async def count(self, text: str) -> int:
        if not self._is_chat:
            return len(self._tokenizer.encode(text))
        messages = [{"role": "user", "content": text}]
        prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return len(self._tokenizer.encode(prompt, add_special_tokens=False))


class ServerCodec:
    """Counts with the server's /tokenize and /detokenize; raises CallFailed when they do not answer."""

    def __init__(self, client: HttpClient, prefix: str, *, is_chat: bool) -> None:
        self._client = client
        self._prefix = prefix
        self._is_chat = is_chat

    async def id_range(self) -> tuple[int, int]:
        high = HIGHEST_ID
        while high > 16:  # no route tells the size of the vocabulary, so ask for its ids
            try:
                await self.decode([high - 1])
                break
            except CallFailed as exc:
                if exc.failure != "status" or "HTTP 400" not in exc.message:
                    raise
                high //= 2
        return min(LOWEST_ID, high // 4), high

    async def encode(self, text: str) -> list[int]:
        tokens: list[int] = await self._ask("/tokenize", "tokens", prompt=text, add_special_tokens=False)
        return tokens

    async def decode(self, ids: list[int]) -> str:
        text: str = await self._ask("/detokenize", "prompt", tokens=ids)
        return text

    async def count(self, text: str) -> int:
        if self._is_chat:
            messages = [{"role": "user", "content": text}]
            count: int = await self._ask("/tokenize", "count", messages=messages)
        else:
            count = await self._ask("/tokenize", "count", prompt=text)
        return count

    async def _ask(self, route: str, field: str, **body: Any) -> Any:
        answer = await self._client.post_json(self._prefix + route, body)
        if not isinstance(answer, dict) or field not in answer:
            raise CallFailed("bad_answer", f"{route}: the answer has no {field!r}; give --tokenizer_path")
        return answer[field]


def output_lengths(num: int, mean: int, *, seed: int, is_fixed: bool) -> list[int]:
    """Output lengths of `num` requests.

    Normal with mean and deviation (2 + 2 * mean) / 2, rounded, clipped to 2..2 * mean; or all `mean`. A mean
    of 1 leaves only the fixed form.
    """
    if is_fixed or mean < 2:
        return [mean] * num
    rng = random.Random(f"output {seed}")
    shortest, longest = 2, 2 * mean
    centre = (shortest + longest) / 2
    return [max(shortest, min(longest, round(rng.gauss(centre, centre)))) for _ in range(num)]


async def exact_prompt(codec: TextCodec, rng: random.Random, length: int, ids: tuple[int, int]) -> str:
    """A random text that the server counts as exactly `length` prompt tokens.

    Random ids are decoded; the text is encoded again, then trimmed or filled until the length holds, because
    a text seldom encodes to the ids that it was decoded from.

    Raises:
        WorkloadError: the length does not come out, e.g. because special tokens alone are longer.
    """
    text = await codec.decode([rng.randrange(*ids) for _ in range(length)])
    for attempt in range(MAX_ATTEMPTS):
        excess = await codec.count(text) - length
        if excess == 0 and text:
            return text
        if excess < 0:
            text += "".join(rng.choice(FILLERS) for _ in range(-excess))
            continue
        # Cutting one more on later attempts breaks a cycle of trimming and filling at the same border.
        tokens = await codec.encode(text)
        kept = len(tokens) - excess - attempt // 4
        text = (await codec.decode(tokens[:kept])).rstrip("\ufffd") if kept > 0 else rng.choice(FILLERS)
    least = await codec.count(FILLERS[0])
    raise WorkloadError(
        f"--input_len: no prompt of exactly {length} tokens in {MAX_ATTEMPTS} attempts; one word has "
        f"{least} with the special tokens and the template of this model"
    )


async def make_jobs(
    codec: TextCodec,
    input_len: int,
    output_lens: Sequence[int],
    *,
    seed: int,
    report: Callable[[int], None],
) -> list[Job]:
    """Make one job for each entry of `output_lens`, several at a time when a server does the counting.

    Args:
        codec: how texts are counted.
        input_len: prompt tokens of each job.
        output_lens: output tokens of each job.
        seed: prompt i depends on this and i alone.
        report: called with the number of jobs done after each.

    Raises:
        WorkloadError: the length cannot be had.
        CallFailed: the server does not answer.
    """
    ids = await codec.id_range()
    jobs: list[Job] = []
    indices = iter(range(len(output_lens)))

    async def work() -> None:
        for index in indices:
            rng = random.Random(f"prompt {seed} {index}")
            prompt = await exact_prompt(codec, rng, input_len, ids)
            jobs.append(Job(index, prompt, output_lens[index]))
            report(len(jobs))

    workers = [asyncio.ensure_future(work()) for _ in range(NUM_PARALLEL_PROMPTS)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
    return sorted(jobs)
