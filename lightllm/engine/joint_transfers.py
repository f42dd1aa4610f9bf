"""JointTransfers: what became of KV transfers whose bytes every rank moves for itself.

A transfer has ended when it has ended on all ranks: only then may slots be used again. It has succeeded if it
has on all. Runs in the engine process, in ProcessExecutor.
"""

from dataclasses import dataclass, field

import msgspec

from lightllm.messages import KVArrival, KVFailure, StepOutput


@dataclass(slots=True)
class _Transfer:
    """One request's: on which ranks it has ended, and the first reason if it has failed on one."""

    ranks: set[int] = field(default_factory=set)
    reason: str | None = None


class JointTransfers:
    """Collects what ranks report, and tells of what has ended on all of them.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._open: dict[str, _Transfer] = {}
        self._sent: list[str] = []
        self._received: list[KVArrival] = []
        self._failed: list[KVFailure] = []

    def note(self, rank: int, sent: list[str], received: list[KVArrival], failed: list[KVFailure]) -> None:
        """Take one rank's report."""
        for failure in failed:
            transfer = self._open.setdefault(failure.request_id, _Transfer())
            transfer.reason = transfer.reason or f"rank {rank}: {failure.reason}"
            self._end(failure.request_id, rank)
        self._sent += [request_id for request_id in sent if self._end(request_id, rank)]
        self._received += [arrival for arrival in received if self._end(arrival.request_id, rank)]

    def joined(self, output: StepOutput) -> StepOutput:
        """The leader's output, with what has ended on all ranks in the place of what it has seen itself."""
        if output.kv_sent or output.kv_received or output.kv_failed:
            self.note(0, output.kv_sent, output.kv_received, output.kv_failed)
        elif not (self._sent or self._received or self._failed):
            return output
        sent, received, failed = self._sent, self._received, self._failed
        self._sent, self._received, self._failed = [], [], []
        return msgspec.structs.replace(output, kv_sent=sent, kv_received=received, kv_failed=failed)

    def _end(self, request_id: str, rank: int) -> bool:
        """Whether it has now ended on all ranks, and well."""
        transfer = self._open.setdefault(request_id, _Transfer())
        transfer.ranks.add(rank)
        if len(transfer.ranks) < self._size:
            return False
        del self._open[request_id]
        if transfer.reason is not None:
            self._failed.append(KVFailure(request_id=request_id, reason=transfer.reason))
        return transfer.reason is None
