"""The native API: `/generate`, `/generate_stream` and `POST /`, as LightLLM's clients read them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from lightllm.api.call import AppContext, Call
from lightllm.api.errors import envelope_members
from lightllm.api.fields import (
    agreed,
    build_params,
    check_n,
    check_priority,
    check_timeout,
    given,
    out_of_range,
    refuse,
    wrong_type,
)
from lightllm.api.openai_output import MIN_LOGPROB, finite
from lightllm.frontend.generation import Emit, Generation, SampleStream
from lightllm.messages import TokenLogprobs
from lightllm.sampling_params import SamplingParams

PREFIX = "parameters."
INTERNAL_FIELDS = ("group_request_id", "suggested_dp_index", "move_kv_to_decode_node")
CONSTRAINTS = ("regular_constraint", "guided_grammar", "guided_json")
DEFAULTS: Mapping[str, Any] = MappingProxyType({})

_SAME_NAMES = (
    "max_new_tokens min_new_tokens do_sample temperature top_p top_k min_p seed presence_penalty "
    "frequency_penalty repetition_penalty input_penalty exponential_decay_length_penalty logit_bias "
    "allowed_token_ids stop_token_ids ignore_eos include_stop_str_in_output skip_special_tokens "
    "add_special_tokens add_spaces_between_special_tokens print_eos_token"
)
FIELDS: Mapping[str, str] = MappingProxyType({name: name for name in _SAME_NAMES.split()})


class NativeParameters(msgspec.Struct, kw_only=True):
    """`parameters` of the native API; null is the default everywhere."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    input_penalty: bool | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    stop_sequences: str | list[str | list[int]] | None = None
    stop: str | list[str | list[int]] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    n: int | None = None
    best_of: int | None = None
    regular_constraint: str | None = None
    guided_grammar: str | None = None
    guided_json: str | dict[str, Any] | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    add_spaces_between_special_tokens: bool | None = None
    print_eos_token: bool | None = None
    return_details: bool | None = None
    timeout_s: float | None = None
    priority: int | None = None
    group_request_id: Any = None
    suggested_dp_index: Any = None
    move_kv_to_decode_node: Any = None


class NativeRequest(msgspec.Struct, kw_only=True):
    """Body of `/generate` and `/generate_stream`."""

    inputs: str | list[int]
    parameters: NativeParameters | None = None
    timeout_s: float | None = None
    priority: int | None = None
    multimodal_params: dict[str, Any] | None = None
    group_request_id: Any = None
    suggested_dp_index: Any = None
    move_kv_to_decode_node: Any = None


class RootRequest(NativeRequest, kw_only=True):
    """Body of `POST /`."""

    stream: bool | None = None


class NativeAnswer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Answer of `/generate`; scalars for one sample, lists by sample for several."""

    generated_text: list[str]
    count_output_tokens: int | list[int]
    finish_reason: str | list[str | None] | None
    prompt_tokens: int
    tokens: list[Any] | None = None


async def generate(call: Call) -> None:
    """`POST /generate`: the whole answer at once."""
    await _answer(call, await call.parse(NativeRequest))


async def generate_stream(call: Call) -> None:
    """`POST /generate_stream`: one frame per token."""
    await _stream(call, await call.parse(NativeRequest))


async def root(call: Call) -> None:
    """`POST /`: either of the two, by `stream`."""
    request = await call.parse(RootRequest)
    await (_stream if request.stream else _answer)(call, request)


async def _answer(call: Call, request: NativeRequest) -> None:
    parameters = request.parameters or NativeParameters()
    has_details = bool(parameters.return_details)
    collector = _Collector(call.context, has_details)
    generation = await _start(call, request, parameters, 0 if has_details else None, collector.emit)
    collector.open(generation)
    await call.wait_finished(generation)
    counts = [sample.num_tokens for sample in generation.samples]
    reasons = [sample.finish_reason for sample in generation.samples]
    is_single = len(generation.samples) == 1
    answer = NativeAnswer(
        generated_text=["".join(pieces) for pieces in collector.texts],
        count_output_tokens=counts[0] if is_single else counts,
        finish_reason=reasons[0] if is_single else reasons,
        prompt_tokens=generation.num_prompt_tokens,
    )
    if has_details:
        answer.tokens = collector.tokens[0] if is_single else list(collector.tokens)
    await call.answer_json(answer)


async def _stream(call: Call, request: NativeRequest) -> None:
    parameters = request.parameters or NativeParameters()
    n = check_n(parameters.n, parameters.best_of, PREFIX)
    if n > 1:
        raise out_of_range(PREFIX + "n", n, "n = 1 on a stream; use /generate for several samples")
    generation = await _start(call, request, parameters, 0, _FrameWriter(call).emit)
    await call.stream(generation)
    await call.finish_stream(generation)


async def _start(
    call: Call, request: NativeRequest, parameters: NativeParameters, logprobs: int | None, emit: Emit
) -> Generation:
    """Check everything in the published order, tokenize and submit."""
    context = call.context
    context.require_serving()
    _check_extras(request, parameters)
    limit_s = context.config.server.request_timeout
    inner_timeout = check_timeout(parameters.timeout_s, limit_s, PREFIX + "timeout_s")
    outer_timeout = check_timeout(request.timeout_s, limit_s)
    timeout_s = agreed(PREFIX + "timeout_s", inner_timeout, "timeout_s", outer_timeout)
    check_priority(parameters.priority, PREFIX + "priority")
    priority = check_priority(agreed("priority", request.priority, PREFIX + "priority", parameters.priority))
    params = _sampling_params(context, parameters, logprobs)
    ids = await _prompt(context, request.inputs, params.add_special_tokens)
    prompt = await context.generator.check_prompt(ids, params.max_new_tokens, "inputs")
    generation = context.generator.start(
        [prompt],
        params,
        emit,
        request_id=call.request_id,
        priority=priority,
        timeout_s=timeout_s,
        add_spaces=True,
    )
    call.watch(generation)
    return generation


async def _prompt(context: AppContext, inputs: str | list[int], add_special_tokens: bool) -> list[int]:
    if not inputs:
        raise out_of_range("inputs", inputs, "a text or a list of token ids that is not empty")
    if isinstance(inputs, str):
        return await context.generator.encode(inputs, add_special_tokens=add_special_tokens)
    return inputs


def _check_extras(request: NativeRequest, parameters: NativeParameters) -> None:
    for name in INTERNAL_FIELDS:
        for owner, prefix in ((request, ""), (parameters, PREFIX)):
            if getattr(owner, name) is not None:
                refuse(prefix + name, "an internal field of LightLLM, never taken from clients")
    if any((request.multimodal_params or {}).values()):
        refuse("multimodal_params", "images and audio are not implemented in this version")
    for name in CONSTRAINTS:
        if getattr(parameters, name):
            refuse(PREFIX + name, "constrained output is not implemented in this version")


def _sampling_params(
    context: AppContext, parameters: NativeParameters, logprobs: int | None
) -> SamplingParams:
    fields = given(parameters, FIELDS)
    if parameters.min_new_tokens is not None and parameters.min_new_tokens < 1:
        allowed = "1 <= min_new_tokens <= max_new_tokens"
        raise out_of_range(PREFIX + "min_new_tokens", parameters.min_new_tokens, allowed)
    stop = agreed(PREFIX + "stop", parameters.stop, PREFIX + "stop_sequences", parameters.stop_sequences)
    if stop is not None:
        fields["stop_sequences"] = [stop] if isinstance(stop, str) else stop
        kinds = {type(entry) for entry in fields["stop_sequences"]}
        if len(kinds) > 1:
            raise wrong_type(PREFIX + "stop_sequences", stop, "only strings, or only lists of ids")
    fields["n"] = check_n(parameters.n, parameters.best_of, PREFIX)
    fields["logprobs"] = logprobs
    return build_params(context, fields, defaults=DEFAULTS, prefix=PREFIX)


class _Collector:
    """Gathers texts, and with details tokens, until the answer is complete."""

    def __init__(self, context: AppContext, has_details: bool) -> None:
        self._special_ids = context.tokenizer.special_ids
        self._has_details = has_details
        self._num_prompt_tokens = 0
        self.texts: list[list[str]] = []
        self.tokens: list[list[dict[str, Any]]] = []
        self._logprob_sums: list[float] = []

    def open(self, generation: Generation) -> None:
        """Make room for each sample; no output comes before the event loop has turned."""
        count = len(generation.samples)
        self._num_prompt_tokens = generation.num_prompt_tokens
        self.texts = [[] for _ in range(count)]
        self.tokens = [[] for _ in range(count)]
        self._logprob_sums = [0.0] * count

    def emit(
        self, sample: SampleStream, token_id: int | None, text: str, logprobs: TokenLogprobs | None
    ) -> None:
        """Take one token."""
        index = sample.index
        if text:
            self.texts[index].append(text)
        if not self._has_details or token_id is None:
            return
        logprob = logprobs.logprob if logprobs is not None else MIN_LOGPROB
        self._logprob_sums[index] += logprob
        self.tokens[index].append(
            {
                "id": token_id,
                "logprob": finite(logprob),
                "cumlogprob": finite(self._logprob_sums[index] / sample.num_tokens),
                "special": token_id in self._special_ids,
                "count_output_tokens": sample.num_tokens,
                "prompt_cache_len": sample.num_cached_tokens,
                "mtp_accepted_token_num": 0,
                "prompt_tokens": self._num_prompt_tokens,
                "text": text,
            }
        )


_FRAME = (
    b'data:{"token":{"id":%b,"text":%b,"logprob":%b,"special":%b,"count_output_tokens":%d,"prompt_tokens":%d},'
    b'"generated_text":null,%b}\n\n'
)
_encode = msgspec.json.encode
_GOING_ON = b'"finished":false,"finish_reason":null,"details":null'


class _FrameWriter:
    """Writes each token of a stream as one frame to the client."""

    __slots__ = ("_call", "_special_ids", "_write")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._special_ids = call.context.tokenizer.special_ids
        self._write = call.client.write

    def emit(
        self, sample: SampleStream, token_id: int | None, text: str, logprobs: TokenLogprobs | None
    ) -> None:
        """Take one token."""
        tail = _GOING_ON if sample.finish_reason is None else _last_members(self._call, sample.finish_reason)
        self._write(
            _FRAME
            % (
                b"null" if token_id is None else b"%d" % token_id,
                _encode(text),
                b"null" if logprobs is None else _encode(finite(logprobs.logprob)),
                b"true" if token_id in self._special_ids else b"false",
                sample.num_tokens,
                len(sample.prompt_token_ids),
                tail,
            )
        )


def _last_members(call: Call, reason: str) -> bytes:
    members = b'"finished":true,"finish_reason":"%b","details":null' % reason.encode()
    error = call.generation.error if call.generation is not None else None
    return members if error is None else members + b"," + envelope_members(error)
