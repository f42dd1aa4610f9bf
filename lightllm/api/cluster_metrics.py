"""What `/metrics` of a pd_master shows of its nodes, beside what every frontend shows.

Read from the node directory whenever the figures are asked for. Runs in the frontend process.
"""

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from lightllm.api.metrics import labelled
from lightllm.api.transfer_metrics import transfer_families
from lightllm.frontend.node_server import ROLES
from lightllm.frontend.pd_router import PDRouter


class ClusterMetrics:
    """A collector of the registry."""

    def __init__(self, model: str, router: PDRouter) -> None:
        self._label = {"model": model}
        self._router = router

    def collect(self) -> Iterator[Metric]:
        """The families of this collector; called by the registry."""
        label, directory = self._label, self._router.directory
        counts = [({"role": role}, float(len(directory.of_role(role)))) for role in ROLES]
        yield labelled("nodes_ready", "nodes that take requests, by role", "gauge", label, counts)
        reasons = [({"reason": reason}, float(count)) for reason, count in self._router.failovers.items()]
        yield labelled("failovers_total", "legs sent again, by reason", "counter", label, reasons)
        nodes = [({"node": node.node_id, "role": node.record.role}, node) for node in directory.all()]
        gauges = {
            "node_requests": [(name, float(len(node.legs))) for name, node in nodes],
            "node_requests_running": [(name, float(node.stats.requests_running)) for name, node in nodes],
            "node_requests_waiting": [(name, float(node.stats.requests_waiting)) for name, node in nodes],
            "node_kv_used_tokens": [(name, float(node.stats.kv_used_tokens)) for name, node in nodes],
            "node_kv_total_tokens": [(name, float(node.info.kv_total_tokens)) for name, node in nodes],
        }
        for name, samples in gauges.items():
            yield labelled(name, f"{name.replace('_', ' ')}", "gauge", label, samples)
        yield from transfer_families(
            label, [(name, totals) for name, node in nodes for totals in node.kv_totals]
        )
