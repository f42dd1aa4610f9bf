"""What the worker processes of a node, and the machines that they run on, tell each other.

Frozen structs as in messages.py, with its codec. Used by the engine's executor of several ranks, by the ranks
and by the machines beside the first.
"""

from lightllm.messages import EngineInfo, Message, ScheduledBatch, StepOutput


class RankProgress(Message, frozen=True):
    """How far a rank has come, as ChildProgress."""

    rank: int
    stage: str
    done: int = 0
    total: int = 0


class RankReady(Message, frozen=True):
    """A rank takes batches."""

    rank: int
    info: EngineInfo


class RankAlive(Message, frozen=True):
    """Sent by each rank every second, whatever it does meanwhile."""

    rank: int


class RankFailed(Message, frozen=True):
    """A rank's last words. `is_cause` is False if all it can say is that another rank is gone."""

    rank: int
    message: str
    exit_code: int = 1
    is_cause: bool = True


class MachineHello(Message, frozen=True):
    """A machine's first word: which it is, and in `record` what must be equal on all of them, by name."""

    node_rank: int
    machine: str
    record: dict[str, str] = {}


class MachineWelcome(Message, frozen=True):
    """All are there. `config` is machine 0's resolved configuration, without secrets; see WorkerConfig."""

    config: bytes
    meeting: str


class MachineAlive(Message, frozen=True):
    """Sent every second in both directions."""


ToMachine = MachineWelcome | MachineAlive | ScheduledBatch
FromRank = RankProgress | RankReady | RankAlive | RankFailed | StepOutput
FromMachine = MachineHello | MachineAlive | FromRank
