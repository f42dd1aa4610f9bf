"""Checks of request fields that both API families share, on top of `sampling_params.validate`.

Pure functions; know nothing of HTTP.
"""

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import msgspec

from lightllm.api.call import AppContext
from lightllm.errors import InvalidSamplingParams, RequestError
from lightllm.sampling_params import SamplingParams, validate

logger = logging.getLogger(__name__)

MAX_PRIORITY = 10
_MODEL_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "do_sample": bool,
        "temperature": (int, float),
        "top_p": (int, float),
        "top_k": int,
        "presence_penalty": (int, float),
        "frequency_penalty": (int, float),
        "repetition_penalty": (int, float),
    }
)

T = TypeVar("T")


def refuse(param: str, why: str) -> NoReturn:
    """Refuse a field that this version, or this server, does not serve."""
    raise RequestError(f"{param}: {why}", code="not_supported", param=param)


def out_of_range(param: str, got: Any, allowed: str) -> RequestError:
    """The error for a value outside its range, in the one wording."""
    text = repr(got)
    shown = text if len(text) <= 80 else text[:77] + "..."
    return RequestError(f"{param}: got {shown}, allowed {allowed}", code="out_of_range", param=param)


def wrong_type(param: str, got: Any, allowed: str) -> RequestError:
    """The error for a value of the wrong type."""
    return RequestError(f"{param}: got {json_type(got)}, allowed {allowed}", code="wrong_type", param=param)


def json_type(value: Any) -> str:
    """The name that JSON has for a value's type."""
    names = {bool: "bool", int: "int", float: "float", str: "str", list: "array", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def agreed(name: str, first: T | None, other_name: str, second: T | None) -> T | None:
    """The value of a field that may be written in two places; both given must agree."""
    if first is not None and second is not None and first != second:
        message = f"{name}: got {first!r}, but {other_name} is {second!r}; give one of them, or both alike"
        raise RequestError(message, code="out_of_range", param=name)
    return second if first is None else first


def check_timeout(timeout_s: float | None, limit_s: float, param: str = "timeout_s") -> float | None:
    """A request's own deadline in seconds: above 0 and at most --request_timeout."""
    if timeout_s is None:
        return None
    if not timeout_s > 0 or (limit_s and timeout_s > limit_s):
        allowed = f"0 < timeout_s <= {limit_s:g}" if limit_s else "timeout_s > 0"
        raise out_of_range(param, timeout_s, allowed)
    return timeout_s


def check_priority(priority: int | None, param: str = "priority") -> int:
    """-10..10, higher first; 0 where None."""
    if priority is not None and not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise out_of_range(param, priority, f"-{MAX_PRIORITY} <= priority <= {MAX_PRIORITY}")
    return priority or 0


def check_n(n: int | None, best_of: int | None, prefix: str = "") -> int:
    """`n`, which `best_of` may repeat or set alone."""
    if n is not None and best_of is not None and n != best_of:
        param = prefix + "best_of"
        raise out_of_range(param, best_of, f"best_of equal to n ({n}), or absent")
    chosen = best_of if n is None else n
    return 1 if chosen is None else chosen


def given(request: msgspec.Struct, names: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `names` that the client has set, under their names in SamplingParams."""
    fields: dict[str, Any] = {}
    for name, target in names.items():
        value = getattr(request, name)
        if value is not None:
            fields[target] = value
    return fields


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's generation_config.json says of sampling, as defaults for requests on all routes.

    Values of a wrong type or out of range are left out, with a warning, rather than failing every request.
    """
    defaults: dict[str, Any] = {}
    for name, kinds in _MODEL_DEFAULTS.items():
        value = generation_config.get(name)
        if value is None:
            continue
        is_valid = isinstance(value, kinds) and isinstance(value, bool) is (kinds is bool)
        try:
            if is_valid:
                validate(SamplingParams(**{name: value}), vocab_size=1)
        except InvalidSamplingParams:
            is_valid = False
        if is_valid:
            defaults[name] = value
        else:
            logger.warning("generation_config.json: %s: %.80r is not used", name, value)
    return defaults


def build_params(
    context: AppContext,
    fields: dict[str, Any],
    *,
    defaults: Mapping[str, Any],
    prefix: str = "",
    renamed: Mapping[str, str] | None = None,
) -> SamplingParams:
    """Sampling parameters from fields, over the model's defaults, over the family's; ranges checked.

    Args:
        fields: by their names in SamplingParams.
        defaults: of the API family.
        renamed: SamplingParams name -> the name that the client has used.

    Raises:
        InvalidSamplingParams: `param` is the client's name of the field.
    """
    params = SamplingParams(**{**defaults, **context.sampling_defaults, **fields})
    info = context.generator.require_info()
    try:
        validate(params, vocab_size=info.vocab_size, prefix=prefix)
    except InvalidSamplingParams as error:
        name = (error.param or "").removeprefix(prefix)
        new = (renamed or {}).get(name)
        if new is None:
            raise
        message = error.message.replace(name, new)
        raise InvalidSamplingParams(message, param=prefix + new) from None
    return params
