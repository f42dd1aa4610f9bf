"""The OpenAI API except its two generating routes: models, tokenizing, and what those two share."""

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from lightllm.api.call import AppContext, Call
from lightllm.api.chat_messages import check_messages
from lightllm.api.fields import build_params, check_n, given, out_of_range, refuse
from lightllm.api.openai_types import (
    CompletionTokensDetails,
    DetokenizeAnswer,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    PromptTokensDetails,
    SamplingFields,
    TokenizeAnswer,
    TokenizeRequest,
    TokensAnswer,
    TokensParameters,
    TokensRequest,
    Usage,
)
from lightllm.errors import LightLLMError, RequestError
from lightllm.frontend.generation import Generation
from lightllm.sampling_params import SamplingParams

ANY_MODEL = "default_model_name"
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0
DEFAULTS: Mapping[str, Any] = MappingProxyType({"min_new_tokens": 0})
GUIDED = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
RENAMED: Mapping[str, str] = MappingProxyType(
    {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_sequences": "stop"}
)
_SAME_NAMES = (
    "temperature top_p seed presence_penalty frequency_penalty logit_bias top_k min_p repetition_penalty "
    "ignore_eos stop_token_ids include_stop_str_in_output skip_special_tokens do_sample"
)
FIELDS: Mapping[str, str] = MappingProxyType(
    {**{name: name for name in _SAME_NAMES.split()}, "min_tokens": "min_new_tokens"}
)


def resolve_model(context: AppContext, name: str | None) -> str:
    """The served name that a client means.

    Raises:
        LightLLMError: code model_not_found, listing the names.
    """
    names = context.model_names
    if not name or name == ANY_MODEL or name == context.config.model.model_dir:
        return names[0]
    if name in names:
        return name
    last = name.rstrip("/").rpartition("/")[2]
    if "/" in name and last in names:
        return last
    known = ", ".join(names)
    raise LightLLMError(
        f"model: {name[:80]!r} is not served here; served: {known}", code="model_not_found", param="model"
    )


def max_model_len(context: AppContext) -> int:
    """Prompt + output in force; the configured one while the model loads."""
    info = context.engine.info
    return info.max_req_total_len if info is not None else context.config.engine.max_req_total_len


async def list_models(call: Call) -> None:
    """`GET /v1/models`."""
    await call.answer_json(ModelList(data=[_card(call.context, name) for name in call.context.model_names]))


async def show_model(call: Call) -> None:
    """`GET /v1/models/{id}`."""
    name = resolve_model(call.context, call.path_params["id"])
    await call.answer_json(_card(call.context, name))


def _card(context: AppContext, name: str) -> ModelCard:
    return ModelCard(id=name, created=context.created_unix_s, max_model_len=max_model_len(context))


# ---------------------------------------------------------------- tokens


async def tokenize(call: Call) -> None:
    """`POST /tokenize`."""
    request = await call.parse(TokenizeRequest)
    context = call.context
    resolve_model(context, request.model)
    if (request.prompt is None) == (request.messages is None):
        message = "prompt: give either prompt or messages"
        raise RequestError(message, code="missing_field", param="prompt")
    if request.messages is not None:
        text = await context.generator.render(check_messages(request.messages))
        ids = await context.generator.encode(text, add_special_tokens=False)
    else:
        add_special_tokens = request.add_special_tokens is not False
        ids = await context.generator.encode(request.prompt or "", add_special_tokens=add_special_tokens)
    answer = TokenizeAnswer(tokens=ids, count=len(ids), max_model_len=max_model_len(context))
    if request.return_token_strs:
        answer.token_strs = await context.generator.token_strs(ids)
    await call.answer_json(answer)


async def detokenize(call: Call) -> None:
    """`POST /detokenize`."""
    request = await call.parse(DetokenizeRequest)
    resolve_model(call.context, request.model)
    vocab_size = call.context.tokenizer.vocab_size
    for token_id in (min(request.tokens, default=0), max(request.tokens, default=0)):
        if not 0 <= token_id < vocab_size:
            raise out_of_range("tokens", token_id, f"ids 0..{vocab_size - 1}")
    await call.answer_json(DetokenizeAnswer(prompt=await call.context.generator.decode(request.tokens)))


async def count_tokens(call: Call) -> None:
    """`GET` or `POST /tokens`; without a body the text is the query's `text`."""
    query = call.query()
    request = TokensRequest(text=query["text"]) if "text" in query else await call.parse(TokensRequest)
    parameters = request.parameters or TokensParameters()
    add_special_tokens = parameters.add_special_tokens is not False
    ids = await call.context.generator.encode(request.text, add_special_tokens=add_special_tokens)
    await call.answer_json(TokensAnswer(ntokens=len(ids)))


async def not_implemented(call: Call) -> None:
    """Routes whose names are reserved."""
    message = f"{call.path} is not implemented in this version"
    raise LightLLMError(message, code="not_implemented")


# ---------------------------------------------------------------- shared by completions and chat


def openai_params(
    context: AppContext, request: SamplingFields, extra: dict[str, Any], best_of: int | None = None
) -> SamplingParams:
    """Sampling parameters of either generating route, in this family's names, defaults and ranges.

    Args:
        extra: fields by their SamplingParams names that the route has made itself.
    """
    for name in GUIDED:
        if getattr(request, name) not in (None, "", [], {}):
            refuse(name, "constrained output is not implemented in this version")
    _check_range("temperature", request.temperature, 0, MAX_TEMPERATURE)
    _check_range("presence_penalty", request.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_range("frequency_penalty", request.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    # This family samples unless the request says otherwise, whatever the model's generation_config says.
    fields = {"do_sample": True, **given(request, FIELDS), **extra}
    if request.stop is not None:
        fields["stop_sequences"] = [request.stop] if isinstance(request.stop, str) else request.stop
    fields["n"] = check_n(request.n, best_of)
    return build_params(context, fields, defaults=DEFAULTS, renamed=RENAMED)


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise out_of_range(name, value, f"{low:g} <= {name} <= {high:g}")


def usage_of(generation: Generation, *, num_output_tokens: int | None = None) -> Usage:
    """The usage of a finished generation."""
    output = generation.num_output_tokens if num_output_tokens is None else num_output_tokens
    prompt = generation.num_prompt_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=output,
        total_tokens=prompt + output,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=generation.num_cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=0),
    )


class AnswerHead:
    """What all answers and chunks of one request share.

    Attributes:
        id: the family's prefix and the request id's digits.
    """

    def __init__(self, call: Call, prefix: str, kind: str, model: str) -> None:
        self.id = prefix + call.request_id.removeprefix("req_")
        self.kind = kind
        self.model = model
        self.created = int(time.time())
        self.fingerprint = f"lightllm-{call.context.version}"

    def members(self) -> dict[str, Any]:
        """The members in order, for a struct or an object."""
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def frame_start(self) -> bytes:
        """The beginning of every chunk, up to and with the bracket of choices."""
        return b"data: " + msgspec.json.encode(self.members())[:-1] + b',"choices":['
