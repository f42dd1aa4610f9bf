"""`POST /v1/completions`: four forms of prompt, several samples, echo, logprobs; whole or streamed."""

from dataclasses import dataclass, field
from typing import Any

from lightllm.api.call import Call
from lightllm.api.fields import check_priority, check_timeout, out_of_range, refuse, wrong_type
from lightllm.api.openai import AnswerHead, openai_params, resolve_model, usage_of
from lightllm.api.openai_output import ChunkWriter, CompletionTokens
from lightllm.api.openai_types import Completion, CompletionChoice, CompletionRequest
from lightllm.frontend.generation import Generation, SampleStream
from lightllm.messages import TokenLogprobs
from lightllm.packed_ints import Ints
from lightllm.sampling_params import Described, SamplingParams

MAX_PROMPTS = 128
# Entries of prompt logprobs in one answer: prompt tokens * (alternatives + 1).
MAX_PROMPT_LOGPROBS = 200_000


@dataclass
class _Choice:
    """What one choice has gathered."""

    pieces: list[str] = field(default_factory=list)
    tokens: CompletionTokens | None = None
    num_echo_chars: int = 0
    has_begun: bool = False


class _Job:
    """One checked request on its way from prompts to choices."""

    def __init__(self, call: Call, request: CompletionRequest, prompts: list[str | list[int]]) -> None:
        self.call = call
        self.has_echo = bool(request.echo)
        self.num_top = request.logprobs
        self.is_score_only = request.max_tokens == 0
        self.given_prompts = prompts
        self.params = _params(call, request)
        self.choices = [_Choice() for _ in range(len(prompts) * self.params.n)]
        if self.num_top is not None:
            for choice in self.choices:
                choice.tokens = CompletionTokens(call.context.generator.detokenizers, self.num_top)

    async def start(self, request: CompletionRequest, emit: Any) -> Generation:
        """Tokenize, check lengths and submit."""
        generator = self.call.context.generator
        timeout_s = check_timeout(request.timeout_s, self.call.context.config.server.request_timeout)
        priority = check_priority(request.priority)
        ids: list[Ints] = []
        for i, prompt in enumerate(self.given_prompts):
            param = "prompt" if len(self.given_prompts) == 1 else f"prompt[{i}]"
            if isinstance(prompt, str):
                prompt = await generator.encode(prompt, add_special_tokens=self.params.add_special_tokens)
            ids.append(await generator.check_prompt(prompt, self.params.max_new_tokens, param))
        if self.has_echo and self.num_top is not None:
            size = sum(len(prompt) for prompt in ids) * (self.num_top + 1) * self.params.n
            if size > MAX_PROMPT_LOGPROBS:
                raise out_of_range(
                    "logprobs",
                    Described(f"{size} entries for the prompt"),
                    f"at most {MAX_PROMPT_LOGPROBS} with echo",
                )
        generation = generator.start(
            ids, self.params, emit, request_id=self.call.request_id, priority=priority, timeout_s=timeout_s
        )
        self.call.watch(generation)
        return generation

    def begin(self, sample: SampleStream) -> str:
        """The echo of a choice, at its first output; fills in the prompt's logprobs."""
        choice = self.choices[sample.index]
        choice.has_begun = True
        if not self.has_echo:
            return ""
        prompt = self.given_prompts[sample.index // self.params.n]
        decode = self.call.context.tokenizer.decode
        skip = self.params.skip_special_tokens
        if not isinstance(prompt, str):
            text = decode(prompt, skip_special_tokens=skip)
        else:
            text = prompt
        choice.num_echo_chars = len(text)
        if choice.tokens is not None and sample.prompt_logprobs is not None:
            if isinstance(prompt, str):
                # It is echoed as it came: with special tokens that it spells out, without those added to it.
                skip = decode(sample.prompt_token_ids, skip_special_tokens=False) != prompt
            choice.tokens.add_prompt(
                sample.prompt_token_ids, sample.prompt_logprobs, skip_special_tokens=skip
            )
        return text

    def note_token(
        self, sample: SampleStream, token_id: int | None, logprobs: TokenLogprobs | None
    ) -> CompletionTokens | None:
        """Add an output token's logprobs to its choice."""
        choice = self.choices[sample.index]
        if choice.tokens is not None and token_id is not None and not self.is_score_only:
            choice.tokens.add(token_id, logprobs, choice.num_echo_chars + sample.text_offset)
        return choice.tokens

    def finish_reason(self, sample: SampleStream) -> str:
        """What the client is told; scoring a prompt always ends at its length of 0 tokens."""
        return "length" if self.is_score_only else sample.finish_reason or "error"

    @property
    def num_output_tokens(self) -> int | None:
        """0 where the one computed token was not asked for, None for what the generation counts."""
        return 0 if self.is_score_only else None


async def completions(call: Call) -> None:
    """`POST /v1/completions`."""
    request = await call.parse(CompletionRequest)
    call.context.require_serving()
    model = resolve_model(call.context, request.model)
    if request.suffix is not None:
        refuse("suffix", "filling in before a suffix is not supported; leave it out")
    prompts = check_prompts(request.prompt)
    job = _Job(call, request, prompts)
    head = AnswerHead(call, "cmpl-", "text_completion", model)
    if request.stream:
        await _stream(call, request, job, head)
    else:
        await _answer(call, request, job, head)


async def _answer(call: Call, request: CompletionRequest, job: _Job, head: AnswerHead) -> None:
    def emit(sample: SampleStream, token_id: int | None, text: str, logprobs: TokenLogprobs | None) -> None:
        choice = job.choices[sample.index]
        if not choice.has_begun:
            choice.pieces.append(job.begin(sample))
        job.note_token(sample, token_id, logprobs)
        if not job.is_score_only:
            choice.pieces.append(text)

    generation = await job.start(request, emit)
    await call.wait_finished(generation)
    choices = [
        CompletionChoice(
            index=sample.index,
            text="".join(choice.pieces),
            logprobs=choice.tokens.take() if choice.tokens is not None else None,
            finish_reason=job.finish_reason(sample),
        )
        for sample, choice in zip(generation.samples, job.choices, strict=True)
    ]
    usage = usage_of(generation, num_output_tokens=job.num_output_tokens)
    await call.answer_json(Completion(**head.members(), choices=choices, usage=usage))


async def _stream(call: Call, request: CompletionRequest, job: _Job, head: AnswerHead) -> None:
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    chunks = ChunkWriter(call.client.write, head, (b'"text":', b""), b'"text":""', include_usage)

    def emit(sample: SampleStream, token_id: int | None, text: str, logprobs: TokenLogprobs | None) -> None:
        reason = sample.finish_reason
        if reason == "error":
            if call.generation is not None and call.generation.error is not None:
                chunks.error(sample.index, call.generation.error)
            return
        choice = job.choices[sample.index]
        if not choice.has_begun:
            echo = job.begin(sample)
            if echo:
                chunks.text(sample.index, echo, choice.tokens.take() if choice.tokens is not None else None)
        tokens = job.note_token(sample, token_id, logprobs)
        if text and not job.is_score_only:
            chunks.text(sample.index, text, tokens.take() if tokens is not None else None)
        if reason is not None:
            columns = tokens.take() if tokens is not None else None
            is_empty = columns is None or not columns.tokens
            chunks.end(sample.index, job.finish_reason(sample), None if is_empty else columns)

    generation = await job.start(request, emit)
    await call.stream(generation, pings=True)
    if generation.error is None:
        chunks.usage(usage_of(generation, num_output_tokens=job.num_output_tokens))
    await call.finish_stream(generation)


def _params(call: Call, request: CompletionRequest) -> SamplingParams:
    extra: dict[str, Any] = {}
    if request.add_special_tokens is not None:
        extra["add_special_tokens"] = request.add_special_tokens
    if request.max_tokens == 0:
        if not request.echo:
            raise out_of_range("max_tokens", 0, "max_tokens >= 1 (0 only with echo)")
        extra["max_new_tokens"] = 1
        # The one token that scoring computes is thrown away, and must not end in a wait for more.
        extra["min_new_tokens"] = 0
    elif request.max_tokens is not None:
        extra["max_new_tokens"] = request.max_tokens
    if request.logprobs is not None:
        extra["logprobs"] = request.logprobs
        if request.echo:
            extra["prompt_logprobs"] = request.logprobs
    return openai_params(call.context, request, extra, request.best_of)


def check_prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request, in whichever of the four forms they came.

    Raises:
        RequestError: `param` is `prompt`, `prompt[i]`, or that of one token id.
    """
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif not isinstance(prompt, list):
        raise wrong_type("prompt", prompt, "str, [str], [int] or [[int]]")
    elif prompt and type(prompt[0]) is int:
        prompts = [prompt]
    else:
        prompts = prompt
    if not prompts:
        raise out_of_range("prompt", prompt, "at least one prompt")
    if len(prompts) > MAX_PROMPTS:
        raise out_of_range("prompt", Described(f"{len(prompts)} prompts"), f"at most {MAX_PROMPTS}")
    is_text = isinstance(prompts[0], str)
    for i, entry in enumerate(prompts):
        param = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
        if isinstance(entry, str) is not is_text or not isinstance(entry, str | list):
            raise wrong_type(param, entry, "all prompts of one kind: str, or lists of token ids")
        if not entry:
            raise out_of_range(param, entry, "a prompt that is not empty")
        if not is_text and set(map(type, entry)) != {int}:
            j, other = next((j, value) for j, value in enumerate(entry) if type(value) is not int)
            raise wrong_type(f"{param}[{j}]", other, "token ids (int)")
    return prompts
