"""`POST /v1/chat/completions`: messages through the model's template, whole or streamed."""

from typing import Any

import msgspec

from lightllm.api.call import AppContext, Call
from lightllm.api.chat_messages import check_messages, template_kwargs
from lightllm.api.fields import (
    agreed,
    check_priority,
    check_timeout,
    out_of_range,
    refuse,
)
from lightllm.api.openai import AnswerHead, openai_params, resolve_model, usage_of
from lightllm.api.openai_output import ChatTokens, ChunkWriter
from lightllm.api.openai_types import ChatChoice, ChatCompletion, ChatMessage, ChatRequest
from lightllm.errors import ContextLengthError
from lightllm.frontend.generation import Emit, Generation, SampleStream
from lightllm.messages import TokenLogprobs
from lightllm.sampling_params import MAX_LOGPROBS, SamplingParams

_FOREVER_REFUSED = (
    ("functions", "use tools"),
    ("function_call", "use tools and tool_choice"),
    ("role_settings", "write the role into a system message"),
    ("character_settings", "write the character into a system message"),
    ("audio", "only text is generated"),
    ("prediction", "predicted outputs are not supported"),
    ("web_search_options", "the server does not search the web"),
)
_LATER = "not implemented in this version"


async def chat_completions(call: Call) -> None:
    """`POST /v1/chat/completions`."""
    request = await call.parse(ChatRequest)
    call.context.require_serving()
    model = resolve_model(call.context, request.model)
    _check_unsupported(request)
    messages = check_messages(request.messages)
    params = _params(call.context, request)
    tokens = [ChatTokens(call.context.generator.detokenizers, params.logprobs or 0) for _ in range(params.n)]
    answer = _stream if request.stream else _answer
    await answer(call, request, messages, params, tokens, model)


async def _answer(
    call: Call,
    request: ChatRequest,
    messages: list[dict[str, Any]],
    params: SamplingParams,
    tokens: list[ChatTokens],
    model: str,
) -> None:
    pieces: list[list[str]] = [[] for _ in tokens]

    def emit(sample: SampleStream, token_id: int | None, text: str, logprobs: TokenLogprobs | None) -> None:
        pieces[sample.index].append(text)
        if token_id is not None:
            tokens[sample.index].add(token_id, logprobs)

    generation = await _start(call, request, messages, params, emit)
    await call.wait_finished(generation)
    has_logprobs = params.logprobs is not None
    choices = [
        ChatChoice(
            index=sample.index,
            message=ChatMessage(content="".join(pieces[sample.index])),
            logprobs=tokens[sample.index].take() if has_logprobs else None,
            finish_reason=sample.finish_reason,
        )
        for sample in generation.samples
    ]
    head = AnswerHead(call, "chatcmpl-", "chat.completion", model)
    await call.answer_json(ChatCompletion(**head.members(), choices=choices, usage=usage_of(generation)))


async def _stream(
    call: Call,
    request: ChatRequest,
    messages: list[dict[str, Any]],
    params: SamplingParams,
    tokens: list[ChatTokens],
    model: str,
) -> None:
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    has_logprobs = params.logprobs is not None
    head = AnswerHead(call, "chatcmpl-", "chat.completion.chunk", model)
    chunks = ChunkWriter(
        call.client.write, head, (b'"delta":{"content":', b"}"), b'"delta":{}', include_usage
    )
    for index in range(params.n):
        chunks.member(index, b'"delta":{"role":"assistant","content":""}')

    def emit(sample: SampleStream, token_id: int | None, text: str, logprobs: TokenLogprobs | None) -> None:
        reason = sample.finish_reason
        if reason == "error":
            if call.generation is not None and call.generation.error is not None:
                chunks.error(sample.index, call.generation.error)
            return
        if has_logprobs and token_id is not None:
            tokens[sample.index].add(token_id, logprobs)
        if text:
            chunks.text(sample.index, text, tokens[sample.index].take() if has_logprobs else None)
        if reason is not None:
            rest = tokens[sample.index].take() if has_logprobs else None
            chunks.end(sample.index, reason, rest if rest is not None and rest.content else None)

    generation = await _start(call, request, messages, params, emit)
    await call.stream(generation, pings=True)
    if generation.error is None:
        chunks.usage(usage_of(generation))
    await call.finish_stream(generation)


async def _start(
    call: Call, request: ChatRequest, messages: list[dict[str, Any]], params: SamplingParams, emit: Emit
) -> Generation:
    context = call.context
    timeout_s = check_timeout(request.timeout_s, context.config.server.request_timeout)
    priority = check_priority(request.priority)
    uses_effort = context.tokenizer.template_uses("reasoning_effort")
    kwargs = template_kwargs(request.chat_template_kwargs, request.reasoning_effort, uses_effort)
    generator = context.generator
    text = await generator.render(messages, **kwargs)
    ids = await generator.encode(text, add_special_tokens=False)
    if _max_tokens(request) is None:
        await generator.check_prompt(ids, 1, "messages")
        room = generator.require_info().max_req_total_len - len(ids)
        if params.min_new_tokens > room:
            message = f"min_tokens: got {params.min_new_tokens}, but the prompt leaves room for {room} tokens"
            raise ContextLengthError(message, param="min_tokens")
        params = msgspec.structs.replace(params, max_new_tokens=room)
    prompt = await generator.check_prompt(ids, params.max_new_tokens, "messages")
    generation = generator.start(
        [prompt], params, emit, request_id=call.request_id, priority=priority, timeout_s=timeout_s
    )
    call.watch(generation)
    return generation


def _max_tokens(request: ChatRequest) -> int | None:
    return agreed("max_tokens", request.max_tokens, "max_completion_tokens", request.max_completion_tokens)


def _params(context: AppContext, request: ChatRequest) -> SamplingParams:
    max_tokens = _max_tokens(request)
    limit = context.generator.require_info().max_req_total_len
    extra: dict[str, Any] = {"max_new_tokens": limit if max_tokens is None else max_tokens}
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= MAX_LOGPROBS:
        raise out_of_range("top_logprobs", request.top_logprobs, f"0 <= top_logprobs <= {MAX_LOGPROBS}")
    if request.top_logprobs and not request.logprobs:
        raise out_of_range("top_logprobs", request.top_logprobs, "0 unless logprobs is true")
    if request.logprobs:
        extra["logprobs"] = request.top_logprobs or 0
    return openai_params(context, request, extra)


def _check_unsupported(request: ChatRequest) -> None:
    for name, remedy in _FOREVER_REFUSED:
        if getattr(request, name) is not None:
            refuse(name, f"not supported; {remedy}")
    if request.modalities not in (None, ["text"], []):
        refuse("modalities", "only text is generated")
    if request.tools not in (None, []):
        refuse("tools", _LATER)
    if request.tool_choice not in (None, "none", "auto"):
        refuse("tool_choice", f"{_LATER}, except none and auto")
    if request.response_format not in (None, {"type": "text"}):
        refuse("response_format", f"{_LATER}, except type text")
