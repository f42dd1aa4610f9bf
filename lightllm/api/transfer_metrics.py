"""What `/metrics` shows of KV transfers: of this node's on a node, of all nodes' on a pd_master.

Labels are a bounded set: `direction` is sent or received, `transport` a lane or none, `outcome` ok, failed or
cancelled, `reason` one of `messages.KV_FAULTS`. Runs in the frontend process.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import Metric

from lightllm.api.metrics import SECONDS, Histogram, labelled
from lightllm.cluster_messages import KVTotals
from lightllm.messages import KVTransfer

Labels = dict[str, str]


class TransferMetrics:
    """The transfers of this node; a collector of the registry."""

    def __init__(self, model: str) -> None:
        self._label = {"model": model}
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._bytes: Counter[tuple[str, str, str]] = Counter()
        self._seconds: dict[str, Histogram] = {}

    def note(self, transfers: list[KVTransfer]) -> None:
        """These have ended."""
        for transfer in transfers:
            key = transfer.direction, transfer.transport, transfer.fault
            self._counts[key] += 1
            self._bytes[key] += transfer.num_bytes
            if not transfer.fault:
                histogram = self._seconds.setdefault(transfer.direction, Histogram(SECONDS))
                histogram.observe(transfer.duration_s)

    def totals(self) -> list[KVTotals]:
        """All so far, one for each combination of labels."""
        return [
            KVTotals(
                direction=direction,
                transport=transport,
                fault=fault,
                num_transfers=count,
                num_bytes=self._bytes[direction, transport, fault],
            )
            for (direction, transport, fault), count in self._counts.items()
        ]

    def collect(self) -> Iterator[Metric]:
        """The families of this collector; called by the registry."""
        yield from transfer_families(self._label, [({}, totals) for totals in self.totals()])
        metric = Metric(
            "lightllm_kv_transfer_duration", "seconds of transfers that came through", "histogram"
        )
        for direction, histogram in self._seconds.items():
            histogram.add_samples(metric, {**self._label, "direction": direction})
        yield metric


def transfer_families(label: Labels, totals: Iterable[tuple[Labels, KVTotals]]) -> Iterator[Metric]:
    """The counters, from totals and the labels of the node that they are of."""
    moved: Counter[tuple[tuple[str, str], ...]] = Counter()
    ends: Counter[tuple[tuple[str, str], ...]] = Counter()
    failures: Counter[tuple[tuple[str, str], ...]] = Counter()
    for node, one in totals:
        way = (*node.items(), ("direction", one.direction), ("transport", one.transport))
        outcome = one.fault if one.fault == "cancelled" else "failed" if one.fault else "ok"
        moved[way] += one.num_bytes
        ends[*way, ("outcome", outcome)] += one.num_transfers
        if outcome == "failed":
            failures[*node.items(), ("direction", one.direction), ("reason", one.fault)] += one.num_transfers
    families = {
        "kv_transfer_bytes_total": ("payload of KV transfers", moved),
        "kv_transfers_total": ("KV transfers by their end", ends),
        "kv_transfer_failures_total": ("KV transfers that failed, by reason", failures),
    }
    for name, (text, counter) in families.items():
        yield labelled(name, text, "counter", label, [(dict(key), value) for key, value in counter.items()])
