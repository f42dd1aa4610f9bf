"""The ASGI application: key, routing, and the one place where errors become answers.

A small dispatcher around Starlette's route matching, which also counts every request: no middleware stack
between socket and handler. Runs in the frontend process.
"""

import logging
import time
from typing import Any

from starlette.routing import Match, Route

from lightllm.addresses import is_loopback
from lightllm.api.call import AppContext, Call, ClientGone
from lightllm.api.keys import is_known_key
from lightllm.api.openai import not_implemented
from lightllm.api.openapi import describe_api
from lightllm.api.request_log import log_request
from lightllm.api.routes import ENDPOINTS, LATER, Endpoint
from lightllm.api.transport import Receive, Send
from lightllm.errors import LightLLMError, RequestError

logger = logging.getLogger(__name__)

__all__ = ["App", "AppContext", "create_app"]


def create_app(context: AppContext) -> "App":
    """The application over an assembled context."""
    return App(context)


class App:
    """Matches a request to its endpoint, checks its key, runs the handler and accounts for the outcome."""

    def __init__(self, context: AppContext) -> None:
        self.context = context
        self._keys = [key.encode() for key in context.config.security.api_key]
        later = [Endpoint(path, ("POST",), not_implemented) for path in LATER]
        description = Endpoint("/openapi.json", ("GET",), self.openapi)
        self._endpoints = [*ENDPOINTS, description, *later]
        self._routes = [(_route(endpoint), endpoint) for endpoint in self._endpoints]
        self._exact = {(e.path, m): e for e in self._endpoints if "{" not in e.path for m in _methods(e)}
        self._document = describe_api([*ENDPOINTS, description], context.version, bool(self._keys))

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        call = Call(self.context, scope, receive, send)
        endpoint: Endpoint | None = None
        try:
            endpoint, allowed = self._match(scope)
            self._check_key(call, endpoint)
            if endpoint is None:
                raise _no_route(call, allowed)
            if self.context.agent is not None and endpoint.generates:
                raise _wrong_role(call, self.context)
            await endpoint.handler(call)
        except LightLLMError as error:
            await call.fail(error, allow=", ".join(sorted(allowed)) if endpoint is None else "")
        except ClientGone:
            call.status, call.code = 499, "client_gone"
        except Exception:
            logger.exception("request %s to %s failed", call.request_id, call.path)
            message = f"internal error; the server's log has the cause under {call.request_id}"
            await call.fail(LightLLMError(message, code="internal"))
        finally:
            call.client.release()
            if call.generation is not None:
                call.generation.abort()  # nobody would read the rest
            self._account(call, endpoint)

    async def openapi(self, call: Call) -> None:
        """`GET /openapi.json`."""
        await call.answer_json(self._document)

    def _match(self, scope: dict[str, Any]) -> tuple[Endpoint | None, set[str]]:
        """The endpoint of a request, or None and the methods that its path has."""
        found = self._exact.get((scope["path"], scope["method"]))
        if found is not None:
            return found, set()
        allowed: set[str] = set()
        for route, endpoint in self._routes:
            match, child_scope = route.matches(scope)
            if match is Match.FULL:
                scope["path_params"] = child_scope["path_params"]
                return endpoint, set()
            if match is Match.PARTIAL:
                allowed |= _methods(endpoint)
        return None, allowed

    def _check_key(self, call: Call, endpoint: Endpoint | None) -> None:
        if endpoint is not None and (endpoint.is_public or (endpoint.is_page and not call.wants_json)):
            return
        if not self._keys:
            if call.path.startswith("/debug/") and not _is_loopback(call.scope):
                raise _wrong_key("without a configured key, /debug answers this machine only")
            return
        if not is_known_key(call.headers, self._keys):
            raise _wrong_key("the key is missing or wrong; send Authorization: Bearer KEY or x-api-key: KEY")

    def _account(self, call: Call, endpoint: Endpoint | None) -> None:
        if endpoint is None or not endpoint.is_counted:
            return
        self.context.metrics.answered(endpoint.path, call.status, call.code)
        duration_s = time.monotonic() - call.started_s
        log_request(
            call.request_id,
            call.label,
            endpoint.path,
            call.status,
            call.code,
            duration_s,
            call.generation,
        )


def _methods(endpoint: Endpoint) -> set[str]:
    return {*endpoint.methods, "HEAD"} if "GET" in endpoint.methods else set(endpoint.methods)


def _route(endpoint: Endpoint) -> Route:
    return Route(endpoint.path, endpoint.handler, methods=endpoint.methods)


def _wrong_role(call: Call, context: AppContext) -> LightLLMError:
    assert context.agent is not None
    masters = ", ".join(context.agent.masters()) or "its pd_master"
    message = f"{call.path}: this is a {context.agent.role} node; send requests to {masters}"
    return LightLLMError(message, code="wrong_role")


def _no_route(call: Call, allowed: set[str]) -> LightLLMError:
    if allowed:
        message = f"{call.path}: got {call.method}, allowed {', '.join(sorted(allowed))}"
        return RequestError(message, code="method_not_allowed")
    return LightLLMError(f"{call.path[:200]}: there is no such route", code="not_found")


def _wrong_key(message: str) -> RequestError:
    return RequestError(message, code="invalid_api_key")


def _is_loopback(scope: dict[str, Any]) -> bool:
    client = scope.get("client")
    return client is not None and is_loopback(str(client[0]))
