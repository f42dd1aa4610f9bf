"""Starts generations: prompts and parameters in, engine requests out, one `Generation` per client request.

Runs in the frontend's event loop; knows nothing of HTTP or JSON.
"""

import asyncio
import ctypes
import functools
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from lightllm.errors import ContextLengthError, RequestError
from lightllm.frontend.detokenizer import DetokenizerFactory
from lightllm.frontend.engine_client import EngineClientLike
from lightllm.frontend.generation import Emit, Generation, NoObserver, Observer, SampleStream
from lightllm.frontend.tokenizer import INLINE_CHARS, INLINE_IDS, Tokenizer
from lightllm.messages import EngineInfo, EngineRequest, RequestFailure
from lightllm.packed_ints import Ints, bounds, pack
from lightllm.sampling_params import SamplingParams

# Longer texts are encoded a few at a time, and what that took (some 90 bytes a character) is given back.
HUGE_CHARS = 1 << 20
HUGE_AT_ONCE = 2
# So many ids of a prompt are packed, or named, before others get their turn.
SLICE_TOKENS = 4096
NAMES_SLICE_TOKENS = 1024
# What a template does for a message, whatever its text, takes as long as so many characters.
MESSAGE_CHARS = 64


class Generator:
    """Starts generations.

    Args:
        tokenizer: of the model served.
        client: where engine requests go.
        request_timeout_s: upper bound for one request, 0 = none.
        observer: who counts tokens and times.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        client: EngineClientLike,
        *,
        request_timeout_s: float = 0.0,
        observer: Observer | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.client = client
        self.request_timeout_s = request_timeout_s
        self.observer: Observer = observer or NoObserver()
        self.detokenizers = DetokenizerFactory(tokenizer)
        self._live: dict[str, Generation] = {}
        self._huge_texts = asyncio.Semaphore(HUGE_AT_ONCE)

    @property
    def num_live(self) -> int:
        """Generations that have not ended."""
        return len(self._live)

    def require_info(self) -> EngineInfo:
        """What is served; raises the 503 error that says why there is nothing."""
        self.client.require_up()
        assert self.client.info is not None
        return self.client.info

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize a text; long ones in a thread, so that other clients' tokens go on."""
        if len(text) <= INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        loop = asyncio.get_running_loop()
        if len(text) <= HUGE_CHARS:
            return await loop.run_in_executor(None, self.tokenizer.encode, text, add_special_tokens)
        async with self._huge_texts:
            return await loop.run_in_executor(None, self._encode_huge, text, add_special_tokens)

    def _encode_huge(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens)
        finally:
            _give_memory_back()

    async def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt text of a conversation; in a thread unless it is a few short texts.

        Args:
            messages: as in the chat API, checked.
            variables: of the template.

        Raises:
            RequestError: there is no template, or it refuses these messages.
        """
        if not variables and _are_short(messages):
            return self.tokenizer.apply_chat_template(messages)
        work = functools.partial(self.tokenizer.apply_chat_template, messages, **variables)
        return await asyncio.get_running_loop().run_in_executor(None, work)

    async def decode(self, ids: list[int]) -> str:
        """Text of some ids of the vocabulary, special tokens by name; of many in a thread."""
        if len(ids) <= INLINE_IDS:
            return self.tokenizer.decode(ids, skip_special_tokens=False)
        return await asyncio.get_running_loop().run_in_executor(None, self.tokenizer.decode, ids, False)

    async def token_strs(self, ids: Sequence[int]) -> list[str]:
        """Each id's own text; of many ids in slices, so that other clients' tokens go on."""
        names: dict[int, str] = {}
        found: list[str] = []
        for start in range(0, len(ids), NAMES_SLICE_TOKENS):
            for token_id in ids[start : start + NAMES_SLICE_TOKENS]:
                if token_id not in names:
                    names[token_id] = self.tokenizer.token_str(token_id)
                found.append(names[token_id])
            await asyncio.sleep(0)
        return found

    async def check_prompt(self, prompt: Sequence[int], max_new_tokens: int, param: str) -> Ints:
        """Check a prompt's ids and length; of a long one in slices, so that other clients' tokens go on.

        Returns:
            The ids, packed.

        Raises:
            RequestError: empty, or an id outside the vocabulary.
            ContextLengthError: prompt + output exceed the limit in force.
        """
        info = self.require_info()
        if not prompt:
            raise RequestError(
                f"{param}: got no tokens, allowed at least 1", code="out_of_range", param=param
            )
        total = len(prompt) + max_new_tokens
        if total > info.max_req_total_len:
            message = (
                f"{param}: the prompt has {len(prompt)} tokens and {max_new_tokens} more are asked for; "
                f"the limit for both is {info.max_req_total_len}; shorten the prompt, ask for fewer tokens "
                "or raise --max_req_total_len"
            )
            raise ContextLengthError(message, param=param)
        try:
            packed = await _packed(prompt)
            low, high = bounds(packed)
        except OverflowError:  # outside of any vocabulary
            low, high = min(prompt), max(prompt)
        if low < 0 or high >= info.vocab_size:
            bad = low if low < 0 else high
            message = f"{param}: got token id {bad}, allowed 0 <= id <= {info.vocab_size - 1}"
            raise RequestError(message, code="out_of_range", param=param)
        return packed

    def start(
        self,
        prompts: list[Ints],
        params: SamplingParams,
        emit: Emit,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        add_spaces: bool = False,
    ) -> Generation:
        """Submit `params.n` samples of each prompt; `emit` is called for every token from now on.

        Args:
            prompts: as `check_prompt` returns them.
            params: checked by `sampling_params.validate`.
            timeout_s: of this request; the generator's own bound where None.
            add_spaces: put spaces around special tokens that are shown (native API).

        Raises:
            LightLLMError: nothing can be submitted now.
        """
        self.client.require_up()
        request_id = request_id or new_request_id()
        generation = Generation(request_id, self.client, self.observer, prompts)
        limit_s = timeout_s or self.request_timeout_s
        deadline_s = time.time() + limit_s if limit_s else None
        requests = self._requests(generation, params, priority, deadline_s)
        samples = self._samples(generation, requests, params, emit, add_spaces)
        generation.open(samples, deadline_s)
        self._live[request_id] = generation
        generation.finished.add_done_callback(lambda _: self._live.pop(request_id, None))
        for request, sample in zip(requests, samples, strict=True):
            self.client.submit(request, sample)
        return generation

    def _requests(
        self, generation: Generation, params: SamplingParams, priority: int, deadline_s: float | None
    ) -> list[EngineRequest]:
        """One request per sample; siblings wait for the first one's prompt, which they share."""
        _, engine_params = self._split_stops(params)
        is_single = len(generation.prompts) * params.n == 1
        requests: list[EngineRequest] = []
        for prompt in generation.prompts:
            first_id: str | None = None
            for sample_index in range(params.n):
                request = EngineRequest(
                    request_id=generation.request_id + ("" if is_single else f"/{len(requests)}"),
                    prompt_token_ids=prompt,
                    sampling_params=engine_params,
                    sample_index=sample_index,
                    after_request_id=first_id,
                    priority=priority,
                    arrival_s=generation.arrival_unix_s,
                    deadline_s=deadline_s,
                )
                first_id = first_id or request.request_id
                requests.append(request)
        return requests

    def _samples(
        self,
        generation: Generation,
        requests: list[EngineRequest],
        params: SamplingParams,
        emit: Emit,
        add_spaces: bool,
    ) -> list[SampleStream]:
        stops, _ = self._split_stops(params)
        print_end = self.detokenizers.token_text if params.print_eos_token else _no_text
        samples: list[SampleStream] = []
        for index, request in enumerate(requests):
            detokenizer = self.detokenizers.new(
                stops=stops,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                add_spaces=add_spaces and params.add_spaces_between_special_tokens,
                prompt_token_ids=request.prompt_token_ids,
            )
            samples.append(SampleStream(generation, index, request, detokenizer, emit, print_end))
        return samples

    def abort(self, request_id: str) -> bool:
        """Cancel a generation with the text so far; False if there is none of that id."""
        generation = self._live.get(request_id)
        if generation is not None:
            generation.abort()
        return generation is not None

    def fail_all(self, code: str, message: str) -> None:
        """End everything that runs in an error."""
        for generation in list(self._live.values()):
            generation.fail(RequestFailure(code=code, message=message))

    def _split_stops(self, params: SamplingParams) -> tuple[list[str], SamplingParams]:
        """Stop strings as text for the frontend, and the parameters without them for the engine.

        Id lists stop at the text that they stand for. A single special token has none when special tokens are
        skipped: it becomes a stop id.
        """
        texts: list[str] = []
        stop_ids = list(params.stop_token_ids)
        for stop in params.stop_sequences:
            if isinstance(stop, str):
                texts.append(stop)
            elif len(stop) == 1 and stop[0] in self.tokenizer.special_ids:
                stop_ids.append(stop[0])
            elif text := self.tokenizer.decode(stop, skip_special_tokens=params.skip_special_tokens):
                texts.append(text)
        if not params.stop_sequences:
            return texts, params
        return texts, msgspec.structs.replace(params, stop_sequences=[], stop_token_ids=stop_ids)


def _give_memory_back() -> None:
    """Have the C library return what is free; by itself it would keep most of it for good."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others need none
    if trim is not None:
        trim(0)


def _are_short(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether messages have a role and a text only, and little of that; others are worth a thread."""
    size = 0
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) or not message.keys() <= {"role", "content"}:
            return False
        size += len(content) + MESSAGE_CHARS
        if size > INLINE_CHARS:
            return False
    return True


async def _packed(prompt: Sequence[int]) -> Ints:
    """The ids as an array; the event loop turns before, between and behind slices of a long prompt."""
    if len(prompt) <= SLICE_TOKENS:
        return pack(prompt)
    packed = pack()
    for start in range(0, len(prompt), SLICE_TOKENS):
        await asyncio.sleep(0)
        packed.extend(pack(prompt[start : start + SLICE_TOKENS]))
    await asyncio.sleep(0)
    return packed


def _no_text(token_id: int) -> str:
    return ""


def new_request_id() -> str:
    """`req_` + 32 hex digits."""
    return f"req_{uuid.uuid4().hex}"
