"""JointTransfers: what became of KV transfers whose bytes every rank moves for itself.

A transfer has ended when it has ended on all ranks: only then may slots be used again. It has succeeded if it
has on all. Its figures are those of all ranks together: the bytes of all, the time of the slowest. Runs in
the engine process, in ProcessExecutor.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from lightllm.messages import KVFailure, KVTransfer, StepOutput
from lightllm.rank_messages import RankTransfers

COLUMNS = ("kv_sent", "kv_received", "kv_failed", "kv_transfers")
"""The fields of StepOutput and RankTransfers that tell of transfers."""


@dataclass(slots=True)
class _Transfer:
    """One request's: on which ranks it has ended, how on each, and the first reason if it failed on one."""

    ranks: set[int] = field(default_factory=set)
    reason: str | None = None
    figures: list[KVTransfer] = field(default_factory=list)


class JointTransfers:
    """Collects what ranks report, and tells of what has ended on all of them.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._open: dict[str, _Transfer] = {}
        self._ended = _nothing()

    def note(self, report: RankTransfers) -> None:
        """Take one rank's report."""
        for figures in report.kv_transfers:
            self._transfer(figures.request_id).figures.append(figures)
        for failure in report.kv_failed:
            transfer = self._transfer(failure.request_id)
            transfer.reason = transfer.reason or f"rank {report.rank}: {failure.reason}"
            self._end(failure.request_id, report.rank)
        ended = self._ended
        ended["kv_sent"] += [i for i in report.kv_sent if self._end(i, report.rank)]
        ended["kv_received"] += [a for a in report.kv_received if self._end(a.request_id, report.rank)]

    def joined(self, output: StepOutput) -> StepOutput:
        """The leader's output, with what has ended on all ranks in the place of what it has seen itself."""
        own = {name: getattr(output, name) for name in COLUMNS}
        if any(own.values()):
            self.note(RankTransfers(rank=0, **own))
        elif not any(self._ended.values()):
            return output
        ended, self._ended = self._ended, _nothing()
        return msgspec.structs.replace(output, **ended)

    def _transfer(self, request_id: str) -> _Transfer:
        return self._open.setdefault(request_id, _Transfer())

    def _end(self, request_id: str, rank: int) -> bool:
        """Whether it has now ended on all ranks, and well."""
        transfer = self._transfer(request_id)
        transfer.ranks.add(rank)
        if len(transfer.ranks) < self._size:
            return False
        del self._open[request_id]
        if transfer.figures:
            self._ended["kv_transfers"].append(_sum(transfer.figures))
        if transfer.reason is not None:
            self._ended["kv_failed"].append(KVFailure(request_id=request_id, reason=transfer.reason))
        return transfer.reason is None


def _nothing() -> dict[str, list[Any]]:
    return {name: [] for name in COLUMNS}


def _sum(figures: list[KVTransfer]) -> KVTransfer:
    """The figures of one transfer on all ranks; what failed on one has failed."""
    faults = [one.fault for one in figures if one.fault]
    return msgspec.structs.replace(
        figures[0],
        transport=next((one.transport for one in figures if one.transport != "none"), "none"),
        fault=faults[0] if faults else "",
        num_bytes=sum(one.num_bytes for one in figures),
        duration_s=max(one.duration_s for one in figures),
    )
