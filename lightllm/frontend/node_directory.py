"""Which prefill and decode nodes a pd_master has, what each can take, and which one suits a request.

Knows numbers and records only; links, requests and their fates belong to the router. Runs in the frontend's
event loop of a pd_master.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any

import msgspec

from lightllm.cluster_messages import KVTotals, NodeRecord
from lightllm.errors import CapacityError
from lightllm.messages import EngineInfo, EngineStats, KVLayout
from lightllm.packed_ints import Ints

PREFIX_BLOCK_TOKENS = 64
MAX_PREFIX_BLOCKS = 65536
# A decode node that was lost a shorter time ago is expected back: requests wait for it.
RETURN_S = 10.0
RETRY_S = 5


class PrefixDigest:
    """Which prompts a node has seen, as hashes of whole blocks, each hash covering all blocks before it.

    An approximation: what the node has evicted in the meantime is not known here, and costs only a wrong
    guess. The oldest blocks are forgotten first.
    """

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def match(self, token_ids: Ints) -> int:
        """How many leading tokens the node has probably computed before."""
        num_tokens = 0
        for stop, digest in _blocks(token_ids):
            if digest not in self._blocks:
                break
            num_tokens = stop
        return num_tokens

    def insert(self, token_ids: Ints) -> None:
        """The node computes this prompt."""
        for _, digest in _blocks(token_ids):
            self._blocks[digest] = None
            self._blocks.move_to_end(digest)
        while len(self._blocks) > MAX_PREFIX_BLOCKS:
            self._blocks.popitem(last=False)


def _blocks(token_ids: Ints) -> Iterator[tuple[int, int]]:
    digest = 0
    for stop in range(PREFIX_BLOCK_TOKENS, len(token_ids) + 1, PREFIX_BLOCK_TOKENS):
        digest = hash((digest, token_ids[stop - PREFIX_BLOCK_TOKENS : stop].tobytes()))
        yield stop, digest


class Node:
    """One registered node.

    Attributes:
        send: sends it a message.
        legs: ids of the requests that it holds for this master.
        promised_tokens: KV that those will take, beyond what its last report counts.
        queued_tokens: prompt tokens that this master has sent and that have brought no token yet.
        full_until_s: it said that it has no room; not asked before this monotonic time.
        kv_totals: what has become of its KV transfers.
        last_error: of a request or link, for `/cluster`.
    """

    def __init__(self, record: NodeRecord, info: EngineInfo, send: Callable[[msgspec.Struct], None]) -> None:
        self.record = record
        self.info = info
        self.send = send
        self.stats = EngineStats(kv_total_tokens=info.kv_total_tokens)
        self.reported_queue_tokens = 0
        self.is_draining = False
        self.legs: set[str] = set()
        self.promised_tokens = 0
        self.queued_tokens = 0
        self.full_until_s = 0.0
        self.prefixes = PrefixDigest()
        self.kv_totals: list[KVTotals] = []
        self.since_unix_s = time.time()
        self.last_error = ""

    @property
    def node_id(self) -> str:
        """Its name."""
        return self.record.node_id

    @property
    def free_tokens(self) -> int:
        """KV that nobody uses or was promised, as far as is known here."""
        used = max(self.stats.kv_used_tokens, self.promised_tokens)
        return self.info.kv_total_tokens - used

    def fits(self, num_tokens: int) -> bool:
        """Whether a request of so many tokens, prompt and output, could ever run here."""
        return num_tokens <= min(self.info.max_req_total_len, self.info.kv_total_tokens)

    def as_json(self) -> dict[str, Any]:
        """For `/cluster`."""
        layout = self.record.layout
        return {
            "node": self.node_id,
            "role": self.record.role,
            "address": self.record.address,
            "kv_address": self.info.kv_address,
            "device": self.info.device,
            "epoch": self.record.epoch,
            "since": round(self.since_unix_s, 3),
            "is_draining": self.is_draining,
            "requests": len(self.legs),
            "requests_running": self.stats.requests_running,
            "requests_waiting": self.stats.requests_waiting,
            "queued_prompt_tokens": max(self.queued_tokens, self.reported_queue_tokens),
            "kv_used_tokens": self.stats.kv_used_tokens,
            "kv_total_tokens": self.info.kv_total_tokens,
            "max_req_total_len": self.info.max_req_total_len,
            "generated_tokens": self.stats.generated_tokens_total,
            "layout": msgspec.to_builtins(layout) if layout is not None else None,
            "last_error": self.last_error,
        }


class NodeDirectory:
    """All registered nodes by id. The first one fixes the layout that all others must have."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._last_lost: tuple[float, Node] | None = None

    def __len__(self) -> int:
        return len(self._nodes)

    def all(self) -> list[Node]:
        """Every node, in the order of registration."""
        return list(self._nodes.values())

    def get(self, node_id: str) -> Node | None:
        """A node by name."""
        return self._nodes.get(node_id)

    def of_role(self, role: str) -> list[Node]:
        """Nodes of a role that take requests."""
        return [node for node in self._nodes.values() if node.record.role == role and not node.is_draining]

    def require(self, role: str) -> None:
        """Raise the 503 error that says that there is no node of a role, if so."""
        if not self.of_role(role):
            message = f"no {role} node is registered at this pd_master; /cluster shows which nodes there are"
            raise CapacityError(message, code="no_nodes", retry_after_s=RETRY_S)

    def offer(self, vocab_size: int) -> EngineInfo | None:
        """What all nodes together serve; None while no decode node is there, nor expected back.

        One whose link has broken dials again within seconds, and so do all of a master that stood still.
        """
        decode = self.of_role("decode") or self._lost_lately()
        if not decode:
            return None
        prefill = self.of_role("prefill") or decode
        limits = [max(node.info.max_req_total_len for node in nodes) for nodes in (prefill, decode)]
        return EngineInfo(
            device=decode[0].info.device,
            dtype=decode[0].info.dtype,
            kv_total_tokens=sum(node.info.kv_total_tokens for node in decode),
            max_req_total_len=min(limits),
            vocab_size=vocab_size,
            load_s=0.0,
            attention_backend=decode[0].info.attention_backend,
        )

    def stats(self) -> EngineStats:
        """Sums over the decode nodes."""
        decode = [node.stats for node in self.of_role("decode")]
        return EngineStats(
            kv_used_tokens=sum(stats.kv_used_tokens for stats in decode),
            kv_cached_tokens=sum(stats.kv_cached_tokens for stats in decode),
            kv_total_tokens=sum(stats.kv_total_tokens for stats in decode),
            kv_committed_tokens=sum(stats.kv_committed_tokens for stats in decode),
            preemptions_total=sum(stats.preemptions_total for stats in decode),
        )

    def misfits(self, record: NodeRecord) -> tuple[str, ...]:
        """Lines that show where a record differs from the cluster's; empty if it may join.

        The record is fixed by the nodes that are there, so it is forgotten when the last one has gone. A node
        that registers anew is not measured against itself.
        """
        others = (node for node in self._nodes.values() if node.node_id != record.node_id)
        reference = next((node.record for node in others), None)
        if reference is None:
            return ()
        return layout_diff(reference.layout, record.layout)

    def add(self, node: Node) -> None:
        """Take a node in; one of the same name must have been removed."""
        assert node.node_id not in self._nodes
        self._nodes[node.node_id] = node

    def remove(self, node: Node) -> bool:
        """Forget a node; False if it has been replaced already."""
        if self._nodes.get(node.node_id) is not node:
            return False
        del self._nodes[node.node_id]
        if node.record.role == "decode" and not node.is_draining:
            self._last_lost = (time.monotonic(), node)
        return True

    def _lost_lately(self) -> list[Node]:
        if self._last_lost is None or time.monotonic() - self._last_lost[0] >= RETURN_S:
            return []
        return [self._last_lost[1]]

    def pick_prefill(self, token_ids: Ints, num_tokens: int, avoid: Collection[str] = ()) -> Node | None:
        """The prefill node that will have computed this prompt first.

        That is the one with the fewest tokens to go: what waits there, and what its cache lacks of this
        prompt. A long cached prefix wins unless its node is that far behind. None if all are to be avoided:
        a decode node does without.
        """
        fitting = [node for node in self.of_role("prefill") if node.fits(num_tokens)]
        candidates = [node for node in fitting if node.node_id not in avoid]

        def work(node: Node) -> tuple[int, int]:
            waiting = max(node.queued_tokens, node.reported_queue_tokens)
            return waiting + len(token_ids) - node.prefixes.match(token_ids), len(node.legs)

        return min(candidates, key=work, default=None)

    def pick_decode(self, num_tokens: int, avoid: Collection[str] = ()) -> Node | None:
        """The decode node with most free KV, of those that have not just said that they are full."""
        now = time.monotonic()
        candidates = [
            node
            for node in self.of_role("decode")
            if node.fits(num_tokens) and node.node_id not in avoid and node.full_until_s <= now
        ]
        return max(candidates, key=lambda node: (node.free_tokens, -len(node.legs)), default=None)


def layout_diff(ours: KVLayout | None, theirs: KVLayout | None) -> tuple[str, ...]:
    """One line for each field in which two records differ."""
    if ours is None or theirs is None:
        return () if ours is theirs else (f"layout: ours {_shown(ours)}, theirs {_shown(theirs)}",)
    return tuple(f"{name}: ours {own}, theirs {other}" for name, own, other in ours.differences(theirs))


def _shown(layout: KVLayout | None) -> str:
    return "none" if layout is None else "one of " + layout.model_hash[:12]
