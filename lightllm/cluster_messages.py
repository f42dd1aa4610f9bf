"""What nodes, pd_masters and the config_server say to each other, inside the sealed frames of `node_link`.

L0. Frozen msgspec structs like those of `messages`; engine messages travel as they are.

    pd_master --ToNode--> prefill and decode nodes;   pd_master <--FromNode-- nodes
    config_server <--Beat-- pd_master;                config_server --ToWatcher--> whoever follows the list
"""

from lightllm.messages import (
    PROTOCOL_VERSION,
    AbortRequest,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    Inspect,
    Inspected,
    KVLayout,
    KVReserved,
    Message,
    Part,
    RenewLeases,
)

REGISTER_PATH, REGISTER_PURPOSE = "/pd_register", "pd_register"
MASTER_PATH, MASTER_PURPOSE = "/pd_master_register", "pd_master_register"
WATCH_PATH, WATCH_PURPOSE = "/pd_masters/watch", "pd_masters_watch"


class NodeRecord(Part, frozen=True):
    """A node as pd_master and config_server know it."""

    node_id: str
    epoch: int
    role: str
    address: str
    layout: KVLayout | None = None
    protocol_version: int = PROTOCOL_VERSION


class Registration(Part, frozen=True):
    """Detail of a node's hello: who it is, and the engine that is up."""

    record: NodeRecord
    info: EngineInfo
    version: str = ""


class Beat(Message, frozen=True):
    """Nothing new, but alive."""


class KVTotals(Part, frozen=True):
    """What has become of a node's KV transfers of one kind since it began; the labels are KVTransfer's."""

    direction: str
    transport: str
    fault: str
    num_transfers: int = 0
    num_bytes: int = 0


class NodeReport(Message, frozen=True):
    """A node's heartbeat. `is_draining`: it takes nothing new."""

    stats: EngineStats
    queued_prompt_tokens: int = 0
    is_draining: bool = False
    kv_totals: list[KVTotals] = []


class Bye(Message, frozen=True):
    """The node leaves for good; its requests are done."""

    reason: str


class MasterEntry(Part, frozen=True):
    """One pd_master of the directory; `since` is a Unix time."""

    node_id: str
    epoch: int
    host: str
    port: int
    since: float = 0.0


class MasterList(Message, frozen=True):
    """All pd_masters; `version` grows with every change in one life of the config_server."""

    version: int
    pd_masters: list[MasterEntry]


ToNode = EngineRequest | AbortRequest | RenewLeases | Inspect | Beat
FromNode = EngineOutput | KVReserved | Inspected | NodeReport | Bye
ToWatcher = MasterList | Beat
