"""KV between nodes: one protocol, one file for each way that the bytes can take.

Read base.py first (what a transport owes the scheduler), then link.py, shipment.py and receipt.py (its two
ends), channel.py and frames.py (what they say to each other), plan.py (which bytes). A way is a lane:
LANES names them in the order in which `--kv_transport auto` tries them. Runs in the worker process.
"""

from collections.abc import Mapping
from types import MappingProxyType

LANES: Mapping[str, str] = MappingProxyType(
    {
        "p2p": "lightllm.transfer.p2p:P2PLane",
        "shm": "lightllm.transfer.shm:ShmLane",
        "nixl": "lightllm.transfer.nixl:NixlLane",
        "tcp": "lightllm.transfer.tcp:TcpLane",
    }
)
"""Name -> module:class of the lanes that are built."""
