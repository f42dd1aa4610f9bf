"""The route table: every path that is served, with its handler, body and answer types.

The router and `/openapi.json` are both made from it, so that neither can lie.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from lightllm.api import admin, chat, completions, native, nodes, openai
from lightllm.api import openai_types as types
from lightllm.api.call import Call

Handler = Callable[[Call], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path and what it does.

    Attributes:
        body, reply: types of the JSON that goes in and out, None where there is none.
        is_public: answers without a key.
        is_page: answers without a key, but not if JSON is asked for: a page that asks for the key itself.
        is_counted: appears in the request metrics and the log.
    """

    path: str
    methods: tuple[str, ...]
    handler: Handler
    body: type[msgspec.Struct] | None = None
    reply: type[msgspec.Struct] | None = None
    is_public: bool = False
    is_page: bool = False
    is_counted: bool = False

    @property
    def generates(self) -> bool:
        """Whether it belongs to the generation APIs, which a prefill or decode node does not serve."""
        return self.is_counted or self.path.startswith("/v1/")


def _api(
    path: str,
    handler: Handler,
    body: type[msgspec.Struct] | None = None,
    reply: type[msgspec.Struct] | None = None,
    methods: tuple[str, ...] = ("POST",),
) -> Endpoint:
    return Endpoint(path, methods, handler, body, reply, is_counted=True)


GET = ("GET",)
EITHER = ("GET", "POST")

ENDPOINTS: tuple[Endpoint, ...] = (
    _api("/generate", native.generate, native.NativeRequest, native.NativeAnswer),
    _api("/generate_stream", native.generate_stream, native.NativeRequest),
    _api("/", native.root, native.RootRequest, native.NativeAnswer),
    _api("/v1/completions", completions.completions, types.CompletionRequest, types.Completion),
    _api("/v1/chat/completions", chat.chat_completions, types.ChatRequest, types.ChatCompletion),
    _api("/tokenize", openai.tokenize, types.TokenizeRequest, types.TokenizeAnswer),
    _api("/detokenize", openai.detokenize, types.DetokenizeRequest, types.DetokenizeAnswer),
    _api("/tokens", openai.count_tokens, types.TokensRequest, types.TokensAnswer, EITHER),
    Endpoint("/v1/models", GET, openai.list_models, reply=types.ModelList),
    Endpoint("/v1/models/{id:path}", GET, openai.show_model, reply=types.ModelCard),
    Endpoint("/health", GET, admin.health, is_public=True),
    Endpoint("/healthz", GET, admin.health, is_public=True),
    Endpoint("/liveness", EITHER, admin.liveness, is_public=True),
    Endpoint("/readiness", EITHER, admin.readiness, is_public=True),
    Endpoint("/get_model_name", EITHER, admin.get_model_name),
    Endpoint("/token_load", GET, admin.token_load),
    Endpoint("/metrics", GET, admin.metrics),
    Endpoint("/debug/requests", GET, admin.list_requests),
    Endpoint("/debug/requests/{id}", GET, admin.show_request),
    Endpoint("/debug/requests/{id}", ("DELETE",), admin.cancel_request),
    Endpoint("/", GET, admin.index_page, is_public=True),
    Endpoint("/dashboard", GET, admin.dashboard_page, is_public=True),
    Endpoint("/cluster", GET, nodes.show_cluster, is_page=True),
)

# Reserved names: answered with not_implemented, and no part of the published API.
LATER: tuple[str, ...] = ("/v1/embeddings", "/v1/responses", "/v1/messages")
