"""`/openapi.json`, made from the route table and the body types: what it says is what is served. Pure."""

from collections.abc import Iterable
from typing import Any

import msgspec

from lightllm.api.routes import Endpoint


def describe_api(endpoints: Iterable[Endpoint], version: str, needs_key: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document.

    Args:
        needs_key: whether routes that are not public ask for a key.
    """
    table = list(endpoints)
    kinds = sorted({k for e in table for k in (e.body, e.reply) if k is not None}, key=lambda k: k.__name__)
    references, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(kinds, references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in table:
        item = paths.setdefault(endpoint.path.replace(":path}", "}"), {})
        for method in endpoint.methods:
            item[method.lower()] = _operation(endpoint, method, schemas, needs_key)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "lightllm", "version": version, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _error_schema()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return document


def _error_schema() -> dict[str, Any]:
    """The one envelope of all errors."""
    return {
        "type": "object",
        "required": ["error", "message"],
        "properties": {
            "message": {"type": "string"},
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "string"},
                },
            },
        },
    }


def _operation(
    endpoint: Endpoint, method: str, schemas: dict[type[msgspec.Struct], Any], needs_key: bool
) -> dict[str, Any]:
    summary = (endpoint.handler.__doc__ or "").split("\n")[0]
    reply: dict[str, Any] = {"description": "the answer"}
    if endpoint.reply is not None:
        reply["content"] = {"application/json": {"schema": schemas[endpoint.reply]}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": f"{method.lower()}_{endpoint.handler.__name__}_{endpoint.path.strip('/') or 'root'}",
        "responses": {"200": reply, "default": {"description": "any error", "content": error}},
    }
    if endpoint.body is not None and method != "GET":
        schema = schemas[endpoint.body]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{id" in endpoint.path:
        operation["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if needs_key and not endpoint.is_public:
        operation["security"] = [{"key": []}]
    return operation
