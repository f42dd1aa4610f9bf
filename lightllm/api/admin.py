"""The operations API: health, readiness, load, metrics, live requests and the static pages."""

from pathlib import Path
from typing import Any

from lightllm.api.call import AppContext, Call
from lightllm.api.fields import out_of_range
from lightllm.api.metrics import CONTENT_TYPE
from lightllm.errors import LightLLMError
from lightllm.messages import EngineStats

STATIC = Path(__file__).parent / "static"
HTML = b"text/html; charset=utf-8"
# The pages carry their script and style in themselves and talk to nobody else.
PAGE_POLICY = (
    b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REFRESH_LIMIT_S = 0.25
DEFAULT_LISTED = 100


async def health(call: Call) -> None:
    """`GET /health`, `/healthz`: whether the engine makes progress, or answers when idle."""
    fault = await call.context.engine.find_fault()
    if fault is not None:
        code = "loading" if fault == "engine: loading" else "engine_down"
        raise LightLLMError(fault, code=code, retry_after_s=5)
    await call.answer_json({"message": "Ok"})


async def liveness(call: Call) -> None:
    """`/liveness`: the HTTP process runs."""
    await call.answer_json({"status": "ok"})


async def readiness(call: Call) -> None:
    """`/readiness`: weights are loaded and one real token was computed; not while draining.

    A pd_master is ready with one node of each role, a node once it is registered.
    """
    call.context.require_ready()
    await call.answer_json({"status": "ok"})


async def get_model_name(call: Call) -> None:
    """`/get_model_name`."""
    await call.answer_json({"model_name": call.context.model_names[0]})


async def token_load(call: Call) -> None:
    """`/token_load`: KV share now, if every request ran to its limit, and the predicted peak.

    On a pd_master of all decode nodes together, and of every node by name.
    """
    answer: dict[str, Any] = {**_load(call.context.engine.stats)}
    if call.context.cluster is not None:
        nodes = call.context.cluster.router.directory.all()
        answer["nodes"] = {node.node_id: _load(node.stats) for node in nodes}
    await call.answer_json(answer)


def _load(stats: EngineStats) -> dict[str, float]:
    total = max(1, stats.kv_total_tokens)
    now = stats.kv_used_tokens / total
    committed = stats.kv_committed_tokens / total
    # Without better knowledge a request is expected to stop half-way to its limit.
    predicted = (now + max(now, committed)) / 2
    return {"current_load": now, "logical_max_load": committed, "dynamic_max_load": predicted}


async def metrics(call: Call) -> None:
    """`GET /metrics`."""
    await call.context.engine.refresh(REFRESH_LIMIT_S)
    await call.answer(call.context.metrics.render(), content_type=CONTENT_TYPE.encode())


async def index_page(call: Call) -> None:
    """`GET /`: the chat page."""
    await serve_page(call, "index.html")


async def dashboard_page(call: Call) -> None:
    """`GET /dashboard`: live plots."""
    await serve_page(call, "dashboard.html")


async def serve_page(call: Call, name: str) -> None:
    """Answer with one of the static pages."""
    path = STATIC / name
    if not path.is_file():
        raise LightLLMError(f"{call.path} is not part of this installation", code="not_found")
    headers = ((b"content-security-policy", PAGE_POLICY), (b"cache-control", b"no-cache"))
    await call.answer(path.read_bytes(), content_type=HTML, headers=headers)


# ---------------------------------------------------------------- requests


async def list_requests(call: Call) -> None:
    """`GET /debug/requests?state=live|done&limit=`."""
    query = call.query()
    state = query.get("state")
    if state not in (None, "live", "done"):
        raise out_of_range("state", state, "live or done")
    limit = query.get("limit", str(DEFAULT_LISTED))
    if not limit.isascii() or not limit.isdigit() or len(limit) > 9:
        raise out_of_range("limit", limit, "a whole number >= 0")
    requests = call.context.requests.listing(state, int(limit))
    live = iter(await _with_nodes(call.context, [one for one in requests if one["state"] != "done"]))
    await call.answer_json({"requests": [one if one["state"] == "done" else next(live) for one in requests]})


async def show_request(call: Call) -> None:
    """`GET /debug/requests/{id}`; on a pd_master with what every node says of it."""
    (found,) = await _with_nodes(call.context, [_find_request(call.context, call.path_params["id"])])
    await call.answer_json(found)


async def cancel_request(call: Call) -> None:
    """`DELETE /debug/requests/{id}`: its client gets the text so far, with finish_reason abort."""
    request_id = call.path_params["id"]
    _find_request(call.context, request_id)
    call.context.generator.abort(request_id)
    await call.answer_json(_find_request(call.context, request_id))


async def _with_nodes(context: AppContext, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests in their published form; the nodes of a cluster are asked, each once for all of them."""
    if context.cluster is None:
        return requests
    entries = [entry for request in requests for entry in request["nodes"]]
    completed = iter(await context.cluster.router.inspector.complete(entries))
    return [{**request, "nodes": [next(completed) for _ in request["nodes"]]} for request in requests]


def _find_request(context: AppContext, request_id: str) -> dict[str, Any]:
    found = context.requests.find(request_id)
    if found is None:
        message = f"request {request_id[:80]!r} is not known; finished ones are kept for a while only"
        raise LightLLMError(message, code="not_found")
    return found
