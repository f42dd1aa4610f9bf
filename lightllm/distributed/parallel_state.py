"""Parallel: this rank's place among all, and its way to the others; an argument, never a global.

Made once when a worker starts, and handed to whoever loads or computes. Runs in the worker.
"""

from dataclasses import dataclass, field

from lightllm.distributed.collectives import LEADER, Collectives, SingleRank


@dataclass(frozen=True, slots=True)
class Parallel:
    """One rank.

    Attributes:
        rank, size: its index, and how many there are.
        local_rank, local_size: the same among those of its machine.
        collectives: what it does together with the others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    collectives: Collectives = field(default_factory=SingleRank)

    @property
    def is_leader(self) -> bool:
        """Whether this rank samples, and answers for all."""
        return self.rank == LEADER
