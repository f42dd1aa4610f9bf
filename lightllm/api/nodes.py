"""What only a pd_master serves: the WebSocket at which nodes register, and `/cluster`.

Runs in the frontend process.
"""

from lightllm.api.admin import serve_page
from lightllm.api.call import Call
from lightllm.api.protocol import WebSockets
from lightllm.cluster_messages import REGISTER_PATH
from lightllm.errors import LightLLMError
from lightllm.frontend.node_server import NodeServer


def web_sockets(cluster: NodeServer | None) -> WebSockets:
    """The node links of this role: none anywhere but on a pd_master."""
    return {} if cluster is None else {REGISTER_PATH.encode(): cluster.accept}


async def show_cluster(call: Call) -> None:
    """`GET /cluster`: a page, or JSON where the client asks for it; every live node and the last refusals."""
    cluster = call.context.cluster
    if cluster is None:
        raise LightLLMError(f"{call.path}: only a pd_master serves it", code="wrong_role")
    if not call.wants_json:
        await serve_page(call, "cluster.html")
        return
    await call.answer_json(cluster.as_json())
