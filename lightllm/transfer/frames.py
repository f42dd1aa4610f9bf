"""What the two ends of a KV transfer say to each other, behind the handshake of cluster_link.

    sender                                    receiver
    Opening                        -->
                                   <--        Choice, or cluster_link's Refused
    Block, and its bytes by lane   -->
                                   <--        Ack            a lane's staging memory may be used again
    Block, is_ahead                -->                       while its KV is computed
    Alive                          -->                       while the sender waits for its engine
    Ready                          -->
                                   <--        Ack
    Complete                       -->
                                   <--        Accepted, or Rejected

A sender whose slots are read in place need not wait for the last Acks, if its Complete promises to keep them:

    Complete, kept_until_s         -->
                                   <--        Accepted, or Rejected; Late: the promise was over
    Complete                       -->        all has been read, and nothing was given up until now
                                   <--        Accepted, or Rejected

Behind Accepted the next transfer may begin on the same connection; behind Refused and Rejected it is closed.
Frozen structs with a schema; anything else ends the transfer.
"""

from typing import Annotated, Any

import msgspec

from lightllm.cluster_link import Refused
from lightllm.messages import KVLayout

PURPOSE = "kv"

Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Frame(msgspec.Struct, frozen=True, tag=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all."""


class LaneOffer(Frame, frozen=True):
    """A way that the bytes could take; `fields` are the lane's own, as msgpack."""

    name: str
    fields: bytes = b""


class Opening(Frame, frozen=True):
    """What this rank of the sender wants to ship, to whom, and how."""

    ticket: str
    target_epoch: int
    rank: int
    layout: KVLayout
    lanes: list[LaneOffer]


class Choice(Frame, frozen=True):
    """The receiver takes the transfer, by this lane, from position `start` on; it has what is before that."""

    lane: str
    start: Annotated[int, msgspec.Meta(ge=0)]


class Block(Frame, frozen=True):
    """`count` tokens from position `start` on are ready; `index` counts the blocks of a transfer.

    `fields` are the lane's own. Before this one the sender has waited `waited_s` for its engine. One that
    `is_ahead` is not ready yet; the next frame but Alive says that it is.
    """

    index: int
    start: int
    count: int
    waited_s: Seconds = 0.0
    fields: bytes = b""
    is_ahead: bool = False


class Ready(Frame, frozen=True):
    """The block that was announced ahead is ready; `waited_s` is as in Block."""

    waited_s: Seconds = 0.0


class Ack(Frame, frozen=True):
    """The oldest block without one has been taken."""


class Alive(Frame, frozen=True):
    """Nothing to send at present."""


class Complete(Frame, frozen=True):
    """All is sent: `num_tokens` in all with those that were there; see plan.digest. `waited_s`: as above.

    With `kept_until_s`, in monotonic time of the host that both are on, some blocks have no Ack yet, and what
    has been read of them until then is right, whatever has happened; else all have one.
    """

    ticket: str
    source_epoch: int
    target_epoch: int
    num_tokens: int
    first_token_id: int
    digest: bytes
    waited_s: Seconds = 0.0
    kept_until_s: Seconds = 0.0


class Late(Frame, frozen=True):
    """All has been read, but not in the time that was promised: an Ack of all blocks that have none."""


class Accepted(Frame, frozen=True):
    """The receiver decodes from here on; the sender may free its slots."""


class Rejected(Frame, frozen=True):
    """The receiver does not take it, in words for the log."""

    reason: str


FromSender = Block | Ready | Alive | Complete
FromReceiver = Ack | Late | Accepted | Rejected
FirstFromReceiver = Choice | Refused


def decode(data: bytes, kind: Any) -> Any:
    """Decode a frame of the given type or union.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return msgspec.msgpack.decode(data, type=kind)


def encode(frame: Frame | Refused) -> bytes:
    """Encode a frame."""
    return msgspec.msgpack.encode(frame)
