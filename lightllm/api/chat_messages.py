"""Checks of a chat's messages: roles, contents, tool history.

Pure functions; the template flattens what passes.
"""

from collections.abc import Mapping
from typing import Any

from lightllm.api.fields import out_of_range, refuse, wrong_type
from lightllm.errors import RequestError
from lightllm.sampling_params import Described

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 10_000
TEMPLATE_KWARGS = (
    "enable_thinking",
    "thinking",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
)
MAX_KWARG_CHARS = 64


def check_messages(messages: list[Any], param: str = "messages") -> list[dict[str, Any]]:
    """Messages as the template takes them.

    Raises:
        RequestError: `param` names the message and the part of it.
    """
    if not messages:
        raise out_of_range(param, messages, "at least one message")
    if len(messages) > MAX_MESSAGES:
        raise out_of_range(param, Described(f"{len(messages)} messages"), f"at most {MAX_MESSAGES}")
    return [_check_message(message, f"{param}[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise wrong_type(where, message, "object")
    role = message.get("role")
    if role is None:
        raise RequestError(
            f"{where}.role: required, but missing", code="missing_field", param=f"{where}.role"
        )
    if not isinstance(role, str):
        raise wrong_type(f"{where}.role", role, "str")
    if role not in ROLES:
        raise out_of_range(f"{where}.role", role, ", ".join(ROLES))
    calls = message.get("tool_calls")
    if calls is not None:
        _check_tool_calls(calls, role, f"{where}.tool_calls")
    _check_content(message.get("content"), bool(calls) and role == "assistant", f"{where}.content")
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        param = f"{where}.tool_call_id"
        raise RequestError(f"{param}: required for role tool", code="missing_field", param=param)
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise wrong_type(f"{where}.reasoning_content", reasoning, "str")
    return message


def _check_content(content: Any, may_be_null: bool, where: str) -> None:
    if content is None:
        if not may_be_null:
            message = f"{where}: required; null only beside an assistant's tool_calls"
            raise RequestError(message, code="missing_field", param=where)
        return
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise wrong_type(where, content, "str or a list of text parts")
    for j, part in enumerate(content):
        place = f"{where}[{j}]"
        if not isinstance(part, dict):
            raise wrong_type(place, part, "object")
        if part.get("type") != "text":
            refuse(place, f"parts of type {str(part.get('type'))[:40]!r} are not supported, only text")
        if not isinstance(part.get("text"), str):
            raise wrong_type(f"{place}.text", part.get("text"), "str")


def _check_tool_calls(calls: Any, role: str, where: str) -> None:
    if not isinstance(calls, list):
        raise wrong_type(where, calls, "array")
    if calls and role != "assistant":
        raise out_of_range(where, Described(f"role {role}"), "tool_calls only in messages of role assistant")
    for j, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong_type(f"{where}[{j}]", call, "object with function.name")
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, str):
            raise wrong_type(f"{where}[{j}].function.arguments", arguments, "str (JSON text)")


def template_kwargs(
    given: Mapping[str, Any] | None, reasoning_effort: str | None, uses_effort: bool
) -> dict[str, Any]:
    """Variables for the template: only known names, only short plain values.

    Args:
        reasoning_effort: the field of the request.
        uses_effort: whether the template looks at it.
    """
    kwargs: dict[str, Any] = {}
    for name, value in (given or {}).items():
        param = f"chat_template_kwargs.{name[:MAX_KWARG_CHARS]}"
        if name not in TEMPLATE_KWARGS:
            refuse(param, f"allowed names are {', '.join(TEMPLATE_KWARGS)}")
        if value is None:
            continue
        if not isinstance(value, bool | int | str):
            raise wrong_type(param, value, "bool, int or str")
        if isinstance(value, str) and len(value) > MAX_KWARG_CHARS:
            raise out_of_range(param, Described(f"{len(value)} characters"), f"at most {MAX_KWARG_CHARS}")
        if name in ("add_generation_prompt", "continue_final_message") and not isinstance(value, bool):
            raise wrong_type(param, value, "bool")
        kwargs[name] = value
    if reasoning_effort is not None:
        if not uses_effort:
            refuse("reasoning_effort", "the chat template of this model does not use it")
        kwargs["reasoning_effort"] = reasoning_effort
    if kwargs.get("continue_final_message"):
        kwargs.setdefault("add_generation_prompt", False)
    return kwargs
