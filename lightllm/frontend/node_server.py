"""A pd_master's end of the links to its nodes: registration, messages, loss.

Checks who registers (token, protocol, layout), keeps one link per node, and calls the router for everything
that comes. Runs in the frontend's event loop of a pd_master.
"""

import logging
from typing import Any

import msgspec

from lightllm import messages
from lightllm.cluster_link import Acceptor, Hello, LinkRefused, Seal, Welcome
from lightllm.cluster_messages import REGISTER_PURPOSE, Beat, Bye, FromNode, NodeReport, Registration
from lightllm.frontend.node_directory import Node
from lightllm.frontend.pd_router import PDRouter
from lightllm.messages import PROTOCOL_VERSION, EngineOutput, Inspected, KVReserved
from lightllm.node_link import Link, accept
from lightllm.web_socket import WebSocket

logger = logging.getLogger(__name__)

ROLES = ("prefill", "decode")
KEPT_REFUSALS = 20


class NodeServer:
    """Accepts nodes.

    Args:
        node_id, epoch: who this master is.
        tokenizer_hash: of the tokenizer whose ids the nodes will get; empty where it is not checked.

    Attributes:
        refusals: the last nodes that were not let in, for `/cluster`.
    """

    def __init__(
        self, router: PDRouter, token: bytes, *, node_id: str, epoch: int, tokenizer_hash: str = ""
    ) -> None:
        self.router = router
        self.node_id = node_id
        self.epoch = epoch
        self.refusals: list[dict[str, Any]] = []
        self._token = token
        self._tokenizer_hash = tokenizer_hash
        self._links: dict[str, _NodeLink] = {}

    def accept(self, socket: WebSocket) -> None:
        """Take a WebSocket that was opened at REGISTER_PATH."""
        acceptor = Acceptor(self._token, REGISTER_PURPOSE)
        owner = _NodeLink(self)

        def greet(hello: Hello, link: Link) -> tuple[bytes, Seal]:
            registration = self._check(acceptor, hello)
            owner.registration, owner.link = registration, link
            return acceptor.welcome(self.node_id, self.epoch)

        accept(socket, acceptor, owner, greet)

    def close(self) -> None:
        """Close all links."""
        for link in list(self._links.values()):
            link.close("the pd_master is stopping")

    def registered(self, owner: "_NodeLink") -> None:
        """A node has come in; its earlier link, if there is one, is replaced."""
        node_id = owner.registration.record.node_id
        earlier = self._links.pop(node_id, None)
        if earlier is not None:
            earlier.replaced()
        self._links[node_id] = owner
        self.refusals = [entry for entry in self.refusals if entry["node"] != node_id]
        self.router.node_joined(owner.node)

    def lost(self, owner: "_NodeLink", reason: str) -> None:
        """A node's link has ended."""
        if self._links.get(owner.node.node_id) is owner:
            del self._links[owner.node.node_id]
        self.router.node_lost(owner.node, reason)

    def as_json(self) -> dict[str, Any]:
        """For `/cluster`."""
        return {
            "pd_master": self.node_id,
            "requests": self.router.num_live,
            "requests_waiting": self.router.num_waiting,
            "failovers": self.router.failovers,
            "nodes": [node.as_json() for node in self.router.directory.all()],
            "pairs": self.router.probes.as_json(),
            "refused": self.refusals,
        }

    def _check(self, acceptor: Acceptor, hello: Hello) -> Registration:
        try:
            registration = msgspec.msgpack.decode(hello.detail, type=Registration)
        except msgspec.DecodeError as error:
            raise acceptor.refuse(
                "bad_protocol", f"the registration is not this version's: {error}"
            ) from error
        record = registration.record
        refusal: LinkRefused | None = None
        if record.node_id != hello.node_id or record.epoch != hello.epoch:
            refusal = acceptor.refuse("bad_frame", "the record names another node than the hello")
        elif record.role not in ROLES:
            refusal = acceptor.refuse("bad_role", f"role {record.role[:40]!r}; allowed {', '.join(ROLES)}")
        elif record.protocol_version != PROTOCOL_VERSION:
            text = f"protocol {record.protocol_version} there, {PROTOCOL_VERSION} here: run equal versions"
            refusal = acceptor.refuse("bad_protocol", text)
        elif record.layout is not None and self._tokenizer_hash not in ("", record.layout.tokenizer_hash):
            text = f"{record.node_id} has another tokenizer than this pd_master; give both the same model"
            line = f"tokenizer_hash: ours {self._tokenizer_hash}, theirs {record.layout.tokenizer_hash}"
            refusal = acceptor.refuse("bad_layout", text, (line,))
        elif diff := self.router.directory.misfits(record):
            text = f"{record.node_id} does not fit the nodes that are here"
            refusal = acceptor.refuse("bad_layout", text, diff)
        if refusal is not None:
            logger.warning("refused %s: %s%s", record.node_id, refusal.message, _lines(refusal.diff))
            entry = {"node": record.node_id, "reason": refusal.reason, "text": refusal.message}
            # A refused node tries again and again: it is shown once.
            others = [other for other in self.refusals if other["node"] != record.node_id]
            self.refusals = [*others, {**entry, "diff": list(refusal.diff)}][-KEPT_REFUSALS:]
            raise refusal
        return registration


class _NodeLink:
    """The link to one node."""

    registration: Registration
    link: Link
    node: Node

    def __init__(self, server: NodeServer) -> None:
        self._server = server
        self._router = server.router
        self._decoder: msgspec.msgpack.Decoder[FromNode] = messages.decoder(FromNode)
        self._is_replaced = False

    def on_open(self, link: Link, welcome: Welcome | None) -> None:
        """The handshake is done."""
        self.node = Node(self.registration.record, self.registration.info, link.send)
        self._server.registered(self)

    def on_body(self, link: Link, body: bytes) -> None:
        """A message of the node; the tokens in it are written to the clients before this returns."""
        match self._decoder.decode(body):
            case EngineOutput(outputs=outputs):
                self._router.on_outputs(self.node, outputs)
            case KVReserved() as message:
                self._router.on_reserved(self.node, message)
            case Inspected() as message:
                self._router.inspector.answered(self.node, message)
            case NodeReport() as report:
                self.node.kv_totals = report.kv_totals
                self._router.node_reported(self.node, report)
            case Bye(reason=reason):
                link.close(reason)

    def on_closed(self, link: Link, reason: str) -> None:
        """Its requests go on elsewhere."""
        if not self._is_replaced:
            self._server.lost(self, reason)

    def heartbeat(self, link: Link) -> Beat:
        """Alive."""
        return Beat()

    def replaced(self) -> None:
        """The node has registered anew: whatever this link knew is gone."""
        self._is_replaced = True
        self._router.node_lost(self.node, "it has registered anew")
        self.link.abort("the node has registered anew")

    def close(self, reason: str) -> None:
        """Say good-bye."""
        self.link.close(reason)


def _lines(diff: tuple[str, ...]) -> str:
    return "".join(f"\n  {line}" for line in diff)
