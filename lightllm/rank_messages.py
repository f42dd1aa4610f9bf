"""What crosses process borders only where a model is spread over several ranks; messages.py has the rest.

The same codec and the same rules. L0.

    engine    --WorkerConfig, ScheduledBatch--> worker process;   engine <--FromRank-- worker process
    machine 0 --ToMachine--> other machines of a node;         machine 0 <--FromMachine-- other machines
"""

from lightllm.messages import (
    EngineInfo,
    KVArrival,
    KVFailure,
    KVTransfer,
    Message,
    ScheduledBatch,
    StepOutput,
)

# ---------------------------------------------------------------- engine <-> its worker processes


class WorkerConfig(Message, frozen=True):
    """First frame on a worker process's stdin: its configuration (JSON of the config struct) and its place.

    Batches come from `address`, everything it has to say goes to `reply_address`; to `bell_address`, if there
    is one, an empty message whenever a KV transfer has ended, of which the next batch will tell. The ranks
    meet at `meeting`: the path of a file where all are on one machine, else host:port of rank 0; `host` is
    where the others reach this machine.
    """

    config: bytes
    rank: int
    local_rank: int
    local_size: int
    address: str
    reply_address: str
    meeting: str
    host: str = "127.0.0.1"
    bell_address: str = ""


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


class RankTransfers(Message, frozen=True):
    """What became of KV transfers on a rank that is not the leader; as in StepOutput."""

    rank: int
    kv_sent: list[str] = []
    kv_received: list[KVArrival] = []
    kv_failed: list[KVFailure] = []
    kv_transfers: list[KVTransfer] = []


class RankFailed(Message, frozen=True):
    """A rank's last words. `is_cause` is False if all it can say is that another rank is gone."""

    rank: int
    message: str
    exit_code: int = 1
    is_cause: bool = True


# ---------------------------------------------------------------- machine 0 <-> the other machines of a node


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


FromRank = RankProgress | RankReady | RankAlive | RankTransfers | RankFailed | StepOutput
ToMachine = MachineWelcome | MachineAlive | ScheduledBatch
FromMachine = MachineHello | MachineAlive | FromRank
