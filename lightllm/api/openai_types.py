"""Bodies of the OpenAI API, as types: what is known is listed here, everything else is an unknown field.

Null is the default everywhere. `Any` marks what the routes check by hand, because the message can then be
better.
"""

from typing import Any

import msgspec


class StreamOptions(msgspec.Struct, kw_only=True):
    """`stream_options`."""

    include_usage: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """Fields that both generating routes know."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted without effect.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # Extensions.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_grammar: Any = None
    guided_choice: Any = None
    timeout_s: float | None = None
    priority: int | None = None
    do_sample: bool | None = None


class CompletionRequest(SamplingFields, kw_only=True):
    """Body of `/v1/completions`."""

    prompt: Any
    max_tokens: int | None = None
    best_of: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: Any = None
    add_special_tokens: bool | None = None


class ChatRequest(SamplingFields, kw_only=True):
    """Body of `/v1/chat/completions`."""

    messages: list[Any]
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    # Always refused.
    functions: Any = None
    function_call: Any = None
    role_settings: Any = None
    character_settings: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of `/tokenize`: one of prompt and messages."""

    prompt: str | None = None
    messages: list[Any] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Answer of `/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of `/detokenize`."""

    tokens: list[int]
    model: str | None = None


class DetokenizeAnswer(msgspec.Struct, kw_only=True):
    """Answer of `/detokenize`."""

    prompt: str


class TokensParameters(msgspec.Struct, kw_only=True):
    """`parameters` of `/tokens`; only this one counts."""

    add_special_tokens: bool | None = None


class TokensRequest(msgspec.Struct, kw_only=True):
    """Body of `/tokens`."""

    text: str
    parameters: TokensParameters | None = None


class TokensAnswer(msgspec.Struct, kw_only=True):
    """Answer of `/tokens`."""

    ntokens: int


class ModelCard(msgspec.Struct, kw_only=True):
    """One served name."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "lightllm"
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """Answer of `/v1/models`."""

    object: str = "list"
    data: list[ModelCard]


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """Part of `Usage`."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, kw_only=True):
    """Part of `Usage`."""

    reasoning_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """What a request has cost: the prompt once, all samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Columns by token; the alternatives by their text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One sample of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct, kw_only=True):
    """Answer of `/v1/completions`."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(msgspec.Struct, kw_only=True):
    """One token with its text and bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, kw_only=True):
    """One output token with its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """`logprobs` of a chat choice."""

    content: list[TokenLogprob]


class ChatMessage(msgspec.Struct, kw_only=True):
    """The assistant's answer."""

    role: str = "assistant"
    content: str | None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One sample."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(msgspec.Struct, kw_only=True):
    """Answer of `/v1/chat/completions`."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
