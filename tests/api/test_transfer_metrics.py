"""Figures of KV transfers: of a node from what its engine tells, of a cluster from its nodes' heartbeats."""

import re
from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from lightllm.api.cluster_metrics import ClusterMetrics
from lightllm.api.metrics import exposition
from lightllm.api.transfer_metrics import TransferMetrics
from lightllm.messages import KV_FAULTS, KVTransfer
from tests.fakes import FakeEngineClient
from tests.pd.harness import Cluster, run, until

ENDED = [
    KVTransfer(request_id="a", direction="sent", transport="shm", num_bytes=1000, duration_s=0.02),
    KVTransfer(request_id="b", direction="sent", transport="shm", num_bytes=500, duration_s=3.0),
    KVTransfer(request_id="c", direction="sent", transport="tcp", num_bytes=70, fault="peer_lost"),
    KVTransfer(request_id="d", direction="sent", transport="shm", num_bytes=30, fault="cancelled"),
    KVTransfer(request_id="e", direction="received", fault="bad_ticket"),
]


def lines(collector: TransferMetrics | ClusterMetrics) -> set[str]:
    """Samples of the families of transfers, without their common name and label."""
    families: Iterable[Metric] = collector.collect()
    found = re.findall(r'^lightllm_(kv_transfer\w*){model="m",(.*)$', exposition(families).decode(), re.M)
    return {f"{name} {rest}" for name, rest in found}


def test_transfers_are_counted_by_way_end_and_reason() -> None:
    metrics = TransferMetrics("m")
    CollectorRegistry().register(metrics)
    metrics.note(ENDED[:3])
    metrics.note(ENDED[3:])
    shown = lines(metrics)
    assert shown > {
        'kv_transfer_bytes_total direction="sent",transport="shm"} 1530',
        'kv_transfer_bytes_total direction="sent",transport="tcp"} 70',
        'kv_transfer_bytes_total direction="received",transport="none"} 0',
        'kv_transfers_total direction="sent",transport="shm",outcome="ok"} 2',
        'kv_transfers_total direction="sent",transport="shm",outcome="cancelled"} 1',
        'kv_transfers_total direction="sent",transport="tcp",outcome="failed"} 1',
        'kv_transfers_total direction="received",transport="none",outcome="failed"} 1',
        'kv_transfer_failures_total direction="sent",reason="peer_lost"} 1',
        'kv_transfer_failures_total direction="received",reason="bad_ticket"} 1',
        'kv_transfer_duration_bucket direction="sent",le="0.025"} 1',
        'kv_transfer_duration_count direction="sent"} 2',
        'kv_transfer_duration_sum direction="sent"} 3.02',
    }
    assert not [line for line in shown if "failures" in line and "cancelled" in line]
    assert not [line for line in shown if "duration" in line and "received" in line]


def test_a_master_shows_those_of_every_node() -> None:
    async def test(cluster: Cluster) -> None:
        for role in ("prefill", "decode"):
            transfers = TransferMetrics("m")
            agent = cluster.join(role, f"{role}-1", FakeEngineClient())
            agent.kv_totals = transfers.totals
            transfers.note([one for one in ENDED if (one.direction == "sent") == (role == "prefill")])
        await cluster.wait_for("prefill-1", "decode-1")
        await until(lambda: all(node.kv_totals for node in cluster.router.directory.all()))
        sender, receiver = 'node="prefill-1",role="prefill"', 'node="decode-1",role="decode"'
        assert lines(ClusterMetrics("m", cluster.router)) >= {
            f'kv_transfer_bytes_total {sender},direction="sent",transport="shm"}} 1530',
            f'kv_transfers_total {sender},direction="sent",transport="shm",outcome="ok"}} 2',
            f'kv_transfer_failures_total {receiver},direction="received",reason="bad_ticket"}} 1',
        }

    run(test)


def test_reasons_are_a_bounded_set_of_words() -> None:
    assert len(set(KV_FAULTS)) == len(KV_FAULTS) < 20
    assert all(re.fullmatch("[a-z_]+", fault) for fault in KV_FAULTS)
