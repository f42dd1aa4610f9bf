"""The one error envelope, as bytes, for every route and status. Pure; knows no ASGI."""

from typing import Any

import msgspec

from lightllm.errors import LightLLMError


def error_fields(error: LightLLMError) -> dict[str, Any]:
    """The `error` object of the envelope."""
    # Inside, each code has one status; outside, headers and bodies share the code.
    code = "too_large" if error.code == "headers_too_large" else error.code
    return {"message": error.message, "type": error.kind.type, "param": error.param, "code": code}


def envelope(error: LightLLMError) -> bytes:
    """The body of an error answer: OpenAI's clients read `error`, LightLLM's read `message`."""
    return msgspec.json.encode({"error": error_fields(error), "message": error.message})


def envelope_members(error: LightLLMError) -> bytes:
    """The same two members without the braces around them, for the end of an SSE frame."""
    return envelope(error)[1:-1]


def error_headers(error: LightLLMError, allow: str = "") -> list[tuple[bytes, bytes]]:
    """Headers that belong to the error's status."""
    headers: list[tuple[bytes, bytes]] = []
    if error.kind.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if allow:
        headers.append((b"allow", allow.encode("ascii")))
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, min(60, error.retry_after_s))).encode()))
    return headers
