"""Every type that crosses a process border, and the codec.

Frozen msgspec structs, encoded as msgpack; unknown types or fields are refused, nothing that can run code is
ever parsed. Mutable state (scheduler requests, tensors) never appears here. Times that cross a border are
Unix seconds, because monotonic clocks of two processes or hosts do not compare.

    frontend  --ToEngine-->    engine  --ScheduledBatch--> worker
    frontend  <--FromEngine--  engine  <--StepOutput-----  worker
    supervisor --ToChild--> frontend, engine;   supervisor <--FromChild-- frontend, engine

What processes of several ranks and machines say beside that is in rank_messages.py.
"""

from typing import Any

import msgspec

from lightllm.packed_ints import Ints, from_wire, pack, to_wire
from lightllm.sampling_params import SamplingParams

PROTOCOL_VERSION = 5

FINISH_REASONS = ("stop", "length", "abort", "error", "handed_over")
"""`handed_over` never reaches a client: a prefill node's request whose KV the decode node has taken."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of all top-level messages: tagged with the class name on the wire."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of types that only occur inside messages.

    Those that come once per request and step are made with `gc=False`: they are in no cycle, and the garbage
    collector need not look at them.
    """


# ---------------------------------------------------------------- frontend <-> engine


class Grammar(Part):
    """A constraint on the output: `kind` is json_schema, regex or grammar, `text` its source."""

    kind: str
    text: str


class KVTarget(Part):
    """To where a prefill node ships the KV of a request: the link that it dials.

    The node is another one than ours; `ticket` is what both ends of one transfer were told by the master,
    valid once.
    """

    node_id: str
    epoch: int
    address: str
    ticket: str


class KVSource(Part):
    """From whom a decode node receives the KV of a request: only this node in this epoch with this ticket."""

    node_id: str
    epoch: int
    ticket: str


class EngineRequest(Message):
    """One sample to generate.

    `output_token_ids` is not empty when a request goes on elsewhere after a failover: the engine continues
    behind them, at the same noise positions. `after_request_id` names the sibling (n > 1) whose prompt is
    shared; this request is admitted once that prompt is computed. `deadline_s` is a Unix time.
    """

    request_id: str
    prompt_token_ids: Ints
    sampling_params: SamplingParams
    output_token_ids: list[int] = []
    sample_index: int = 0
    after_request_id: str | None = None
    priority: int = 0
    arrival_s: float = 0.0
    deadline_s: float | None = None
    grammar: Grammar | None = None
    send_kv_to: KVTarget | None = None
    recv_kv_from: KVSource | None = None


class AbortRequest(Message):
    """Stop a request; its slots are freed before the next step. An unknown id is not an error.

    `reason` becomes the finish_reason of the final output: "stop" when the frontend matched a stop string,
    "abort" when an operator cancelled it or the client has left.
    """

    request_id: str
    reason: str = "abort"


class AbortAll(Message):
    """Sent by a frontend when it starts: whatever the engine still holds belongs to nobody any more."""


class RenewLeases(Message):
    """These requests are still wanted. One that sends or receives KV ends when its lease is not renewed."""

    request_ids: list[str]


class Inspect(Message):
    """Ask for what is known of these requests: an `Inspected` with the same nonce."""

    nonce: int
    request_ids: list[str]


class Ping(Message):
    """Ask for a `Pong` between two steps; never runs a model step."""

    nonce: int


class TokenLogprobs(Part, array_like=True, gc=False):
    """Log-probabilities at one position: of the token itself and of the most likely alternatives."""

    logprob: float
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class RequestFailure(Part):
    """Why a request ended in an error: a code of `errors.ERROR_CODES` and a sentence for the client."""

    code: str
    message: str


class RequestOutput(Part, omit_defaults=True, gc=False):
    """What one step brought for one request. With a `finish_reason` it is the request's last output.

    `logprobs` is aligned with `new_token_ids`. `prompt_logprobs` comes once, with the first token, one entry
    per prompt token (None for the first). `num_cached_tokens` and `queue_s`, the seconds from arrival to
    admission, come with the first token and with the last output.
    """

    request_id: str
    new_token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    error: RequestFailure | None = None
    num_cached_tokens: int = 0
    queue_s: float = 0.0


class EngineStats(Part):
    """State of the engine after a step. Counters grow from process start; step_* describe the last step."""

    requests_running: int = 0
    requests_waiting: int = 0
    kv_used_tokens: int = 0
    kv_cached_tokens: int = 0
    kv_total_tokens: int = 0
    kv_committed_tokens: int = 0
    preemptions_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    steps_total: int = 0
    step_duration_s: float = 0.0
    step_batch_size: int = 0
    step_num_tokens: int = 0
    step_phase: str = "idle"


KV_FAULTS = (
    *("cancelled", "peer_lost", "peer_silent", "bad_token", "bad_ticket", "old_epoch", "bad_layout"),
    *("no_lane", "refused", "not_accepted", "bad_frame", "no_link", "stopped", "other"),
)
"""Why KV transfers fail, as labels of metrics. `cancelled`: this node did not want it any more."""


class KVTransfer(Part):
    """One transfer that has ended, on one node, for the figures.

    `direction` is sent or received; `transport` the lane, or none if the two ends had not agreed on one;
    `fault` one of KV_FAULTS, empty if all went well. `duration_s` counts from when the two ends
    had found each other (where they had not, from the order), without the time in which all had moved that
    there was, and the sender's engine computed the rest.
    """

    request_id: str
    direction: str
    transport: str = "none"
    fault: str = ""
    num_bytes: int = 0
    duration_s: float = 0.0


class EngineOutput(Message):
    """All outputs of a step, in one message; there may be none, the step is heard of all the same.

    `kv_transfers` are those that have ended since the last such message.
    """

    outputs: list[RequestOutput]
    stats: EngineStats
    kv_transfers: list[KVTransfer] = []


class KVReserved(Message):
    """A request with `recv_kv_from` has its slots, the first `num_cached_tokens` with their KV."""

    request_id: str
    num_cached_tokens: int


class RequestView(Part):
    """One request as its engine sees it: where it is, the KV slots that it holds, what happened when.

    Times are Unix seconds; `lease_until_s` is when it ends if nobody renews it, None where it has no lease.
    """

    request_id: str
    state: str
    num_tokens: int = 0
    num_computed_tokens: int = 0
    num_kv_tokens: int = 0
    lease_until_s: float | None = None
    events: list[tuple[str, float]] = []


class Inspected(Message):
    """Answer to `Inspect`; requests that are not known are left out. `fault`: why nothing is known."""

    nonce: int
    views: list[RequestView] = []
    fault: str = ""


class Pong(Message):
    """Answer to `Ping`."""

    nonce: int
    stats: EngineStats


# ---------------------------------------------------------------- engine <-> worker


class NewRequest(Part):
    """A request that enters (or, after preemption, re-enters) a row of the worker's tables.

    `token_ids` are all tokens known so far, of which the first `num_prompt_tokens` are the prompt. `seed` is
    final: the engine draws one for requests that came without.
    """

    request_id: str
    row: int
    token_ids: Ints
    num_prompt_tokens: int
    sampling_params: SamplingParams
    eos_token_ids: list[int]
    seed: int
    sample_index: int = 0


class KVTransferOrder(Part):
    """Ship, or expect, the KV of the tokens from position `start` on, which lie in `slots`, one a token.

    A request is shipped in several orders, one behind each step that computed a part of it, and expected in
    one. The first order of a shipment starts at 0; the receiver says what it has of that. A later one may
    find the shipment failed, unheard of by the engine yet, and then means nothing. `is_computed`: earlier
    steps have computed it, so it need not wait for the one with which it comes. `token_ids` are all tokens
    whose KV the receiver has in the end: with every receipt, and with the last order of a shipment, whose
    step samples the first token behind them for `row`.
    """

    request_id: str
    start: int
    slots: Ints
    token_ids: Ints = msgspec.field(default_factory=pack)
    row: int = -1
    is_computed: bool = False
    target: KVTarget | None = None
    source: KVSource | None = None


class ScheduledBatch(Message):
    """One step, as columns: entry i of the column lists belongs to the i-th scheduled request.

    new_requests        rows to (re)initialise before anything else
    freed_rows          rows whose request has gone since the last batch
    rows                row of the request in the worker's tables
    starts              first position computed in this step (= num_computed_tokens before it)
    num_new_tokens      how many positions are computed
    is_sampling         whether the step samples a token behind the last of them
    slot_starts         first position whose slot is (re)written in slot_table
    slot_counts         how many slots follow for this request in `slots`, flat
    drafts              index of a request -> guesses of the tokens behind the first that is computed; each
                        position samples, and the step brings tokens up to the first that is not as guessed
    grammar_masks       row -> packed bit mask over the vocabulary, little endian
    kv_sends            KV that may leave once this step is computed, or at once
    kv_recvs            KV that may arrive once all earlier steps are computed
    kv_cancels          requests whose transfer is not wanted any more
    is_restart          a step has failed, and behind it those that followed: from here on things go on

    A batch without rows computes nothing: it carries orders and fetches what the transport has to tell.
    One that does nothing else `is_question`.
    """

    step_id: int
    new_requests: list[NewRequest] = []
    freed_rows: list[int] = []
    rows: list[int] = []
    starts: list[int] = []
    num_new_tokens: list[int] = []
    is_sampling: list[bool] = []
    slot_starts: list[int] = []
    slot_counts: list[int] = []
    slots: Ints = msgspec.field(default_factory=pack)
    drafts: dict[int, list[int]] = {}
    grammar_masks: dict[int, bytes] = {}
    kv_sends: list[KVTransferOrder] = []
    kv_recvs: list[KVTransferOrder] = []
    kv_cancels: list[str] = []
    is_restart: bool = False

    @property
    def is_question(self) -> bool:
        """Whether nothing is to be done but to tell of transfers."""
        rows = self.rows or self.new_requests or self.freed_rows
        return not (rows or self.kv_sends or self.kv_recvs or self.kv_cancels or self.is_restart)


class KVArrival(Part):
    """All KV of a request is in its slots; the sender has sampled the first token behind it."""

    request_id: str
    first_token_id: int


class KVFailure(Part):
    """A transfer that failed or was cancelled."""

    request_id: str
    reason: str


class StepOutput(Message):
    """Result of a step, aligned with the columns of its batch.

    `token_ids[i]` is empty where the batch did not sample, has one token normally and several with
    speculation. `logprobs` and `prompt_logprobs` hold only rows that asked for them, by index into the batch;
    `prompt_logprobs[i]` entry j is about the prompt token at position starts[i] + 1 + j, which the positions
    computed in this step predict; tokens behind the prompt are left out. Each transfer ends in exactly one of
    `kv_sent`, `kv_received` and `kv_failed`; from then on the transport touches its slots no more. For each
    of them there is one in `kv_transfers`.
    """

    step_id: int
    token_ids: list[list[int]]
    logprobs: dict[int, list[TokenLogprobs]] = {}
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    duration_s: float = 0.0
    kv_sent: list[str] = []
    kv_received: list[KVArrival] = []
    kv_failed: list[KVFailure] = []
    kv_transfers: list[KVTransfer] = []


# ---------------------------------------------------------------- supervisor <-> its children


class KVLayout(Part):
    """The record in which nodes of one model must agree before KV may move between them.

    They may differ in `tp_size`: each head goes from a rank that has it to those that need it.
    """

    model_hash: str
    tokenizer_hash: str
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    kv_dtype: str
    tp_size: int
    quantization: str = "none"

    def differences(self, other: "KVLayout") -> list[tuple[str, Any, Any]]:
        """Name, own value and the other's of each field in which two records differ but should not."""
        names = [name for name in self.__struct_fields__ if name != "tp_size"]
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [(name, own, theirs) for name, own, theirs in pairs if own != theirs]


class EngineInfo(Part):
    """What the rest of the node needs to know of a ready engine.

    `kv_address` is where its KV link listens, empty where it has none; `kv_layout` what its peers must agree
    on; `kv_epoch` tells this life of the link from earlier ones.
    """

    device: str
    dtype: str
    kv_total_tokens: int
    max_req_total_len: int
    vocab_size: int
    load_s: float
    attention_backend: str
    kv_address: str = ""
    kv_layout: KVLayout | None = None
    kv_epoch: int = 0


class ChildConfig(Message):
    """First frame on a child's stdin: its configuration (JSON of the config struct) and its addresses."""

    config: bytes
    address: str = ""
    reply_address: str = ""
    listen_fds: list[int] = []
    epoch: int = 0


class EngineUp(Message):
    """The engine of this epoch is ready at `address`; its outputs arrive at `reply_address`."""

    epoch: int
    address: str
    reply_address: str
    info: EngineInfo


class EngineDown(Message):
    """The engine died. Everything it held must end in an error now."""

    epoch: int
    reason: str
    is_restarting: bool


class Drain(Message):
    """Take nothing new; finish what runs within `timeout_s`, then exit 0."""

    timeout_s: float


class ChildProgress(Message):
    """How far a child has come; `done`/`total` in units of the stage (bytes, tensors)."""

    stage: str
    done: int = 0
    total: int = 0


class ChildReady(Message):
    """The child serves. `info` comes from the engine only."""

    info: EngineInfo | None = None


class ChildFailed(Message):
    """The child's first error, as one readable line, and the exit code it asks the parent to use."""

    message: str
    exit_code: int = 1


ToEngine = EngineRequest | AbortRequest | AbortAll | RenewLeases | Inspect | Ping
FromEngine = EngineOutput | KVReserved | Inspected | Pong
ToChild = ChildConfig | EngineUp | EngineDown | Drain
FromChild = ChildProgress | ChildReady | ChildFailed

_ENCODER = msgspec.msgpack.Encoder(enc_hook=to_wire)


def encode(message: msgspec.Struct) -> bytes:
    """Encode one message as msgpack."""
    return _ENCODER.encode(message)


def decode(data: bytes | memoryview, kind: Any) -> Any:
    """Decode one message of the given type or union (a type checker cannot name the latter's value).

    Raises:
        msgspec.ValidationError: the bytes are not exactly such a message.
    """
    return msgspec.msgpack.decode(data, type=kind, dec_hook=from_wire)


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """A reusable decoder for hot paths."""
    return msgspec.msgpack.Decoder(kind, dec_hook=from_wire)
