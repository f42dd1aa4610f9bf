"""SamplingParams: how one request wants its tokens chosen, and the ranges that each field allows.

Field names are those of the native API. Types are checked where JSON is parsed; `validate` checks ranges and
needs only plain integers (vocabulary size, room left), so it runs in the frontend before any status line.
Knows nothing of HTTP, tokenizers or torch.
"""

import math

import msgspec

from lightllm.errors import InvalidSamplingParams

MAX_LOGPROBS = 20
MAX_SAMPLES = 16
MAX_STOP_SEQUENCES = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_CONSTRAINT_BYTES = 256 * 1024
GREEDY_TEMPERATURE = 1e-5


class Described(str):
    """What a message says of a value instead of the value itself, so without its quotes: `17 sequences`."""

    def __repr__(self) -> str:
        return str(self)


class SamplingParams(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """How to choose the output tokens of one request.

    `do_sample=False` is greedy: temperature, top_p, top_k, min_p and seed have no effect, penalties and bias
    do. `logprobs` counts the alternatives reported per output token (0: the chosen token alone, None:
    nothing); `prompt_logprobs` likewise for the prompt. Reported values are log-softmax of the model's raw
    logits.
    """

    max_new_tokens: int = 16
    min_new_tokens: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    input_penalty: bool = False
    exponential_decay_length_penalty: tuple[int, float] = (1, 1.0)
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] = []
    stop_sequences: list[str | list[int]] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    regular_constraint: str = ""
    guided_grammar: str = ""
    guided_json: str = ""
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    add_spaces_between_special_tokens: bool = True
    print_eos_token: bool = False

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return not self.do_sample or self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens seen so far."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


def validate(params: SamplingParams, *, vocab_size: int, prefix: str = "") -> None:
    """Check every range that does not depend on the prompt.

    Args:
        params: the fields as the client sent them, defaults filled in.
        vocab_size: ids must lie in 0..vocab_size-1.
        prefix: put before field names in messages and in `param` (`"parameters."` on the native routes).

    Raises:
        InvalidSamplingParams: names the field, the value got and the range allowed.
    """
    check = _Checker(prefix)
    check.number("max_new_tokens", params.max_new_tokens, 1, 2**31 - 1)
    check.number("min_new_tokens", params.min_new_tokens, 0, params.max_new_tokens)
    check.number("temperature", params.temperature, 0, 100)
    check.number("top_p", params.top_p, 0, 1)
    check.number("min_p", params.min_p, 0, 1)
    check.require("top_k", params.top_k, -1 <= params.top_k <= 2**31 - 1, "-1 or 0 (off), or >= 1")
    if params.seed is not None:
        check.number("seed", params.seed, -(2**63), 2**63 - 1)
    check.number("presence_penalty", params.presence_penalty, -100, 100)
    check.number("frequency_penalty", params.frequency_penalty, -100, 100)
    penalty = params.repetition_penalty
    check.require("repetition_penalty", penalty, 0 < penalty <= 100, "0 < repetition_penalty <= 100")
    start, factor = params.exponential_decay_length_penalty
    check.require(
        "exponential_decay_length_penalty",
        [start, factor],
        start >= 0 and 1.0 <= factor < math.inf,
        "[int >= 0, float >= 1]",
    )
    check.number("n", params.n, 1, MAX_SAMPLES)
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        if count is not None:
            check.number(name, count, 0, MAX_LOGPROBS)
    _check_ids(check, params, vocab_size)
    _check_stops(check, params, vocab_size)
    _check_constraints(check, params)


class _Checker:
    """Raises InvalidSamplingParams with one wording for all fields."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def require(self, name: str, got: object, is_ok: bool, allowed: str) -> None:
        if not is_ok:
            field = self.prefix + name
            raise InvalidSamplingParams(f"{field}: got {_short(got)}, allowed {allowed}", param=field)

    def number(self, name: str, got: float, low: float, high: float) -> None:
        self.require(name, got, low <= got <= high, f"{low} <= {name} <= {high}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_ids(check: _Checker, params: SamplingParams, vocab_size: int) -> None:
    count = len(params.logit_bias)
    allowed = f"at most {MAX_LOGIT_BIAS} entries"
    check.require("logit_bias", Described(f"{count} entries"), count <= MAX_LOGIT_BIAS, allowed)
    for token_id, bias in params.logit_bias.items():
        check.require("logit_bias", token_id, 0 <= token_id < vocab_size, f"ids 0..{vocab_size - 1}")
        check.require("logit_bias", bias, -100 <= bias <= 100, "values -100..100")
    count = len(params.stop_token_ids)
    allowed = f"at most {MAX_STOP_TOKEN_IDS} ids"
    check.require("stop_token_ids", Described(f"{count} ids"), count <= MAX_STOP_TOKEN_IDS, allowed)
    count = len(params.allowed_token_ids)
    check.require(
        "allowed_token_ids", Described(f"{count} ids"), count <= vocab_size, f"at most {vocab_size} ids"
    )
    for name in ("stop_token_ids", "allowed_token_ids"):
        for token_id in getattr(params, name):
            check.require(name, token_id, 0 <= token_id < vocab_size, f"ids 0..{vocab_size - 1}")


def _check_stops(check: _Checker, params: SamplingParams, vocab_size: int) -> None:
    stops = params.stop_sequences
    allowed = f"at most {MAX_STOP_SEQUENCES} sequences"
    check.require(
        "stop_sequences", Described(f"{len(stops)} sequences"), len(stops) <= MAX_STOP_SEQUENCES, allowed
    )
    for stop in stops:
        if isinstance(stop, str):
            allowed = f"strings of 1..{MAX_STOP_CHARS} characters"
            is_ok = 1 <= len(stop) <= MAX_STOP_CHARS
            check.require("stop_sequences", Described(f"{len(stop)} characters"), is_ok, allowed)
            continue
        allowed = f"lists of 1..{MAX_STOP_IDS} ids"
        check.require(
            "stop_sequences", Described(f"{len(stop)} ids"), 1 <= len(stop) <= MAX_STOP_IDS, allowed
        )
        for token_id in stop:
            check.require("stop_sequences", token_id, 0 <= token_id < vocab_size, f"ids 0..{vocab_size - 1}")


def _check_constraints(check: _Checker, params: SamplingParams) -> None:
    names = ("regular_constraint", "guided_grammar", "guided_json")
    given = [name for name in names if getattr(params, name)]
    check.require("/".join(given), given, len(given) <= 1, "one constraint per request")
    for name in given:
        size = len(getattr(params, name).encode())
        allowed = f"at most {MAX_CONSTRAINT_BYTES} bytes"
        check.require(name, Described(f"{size} bytes"), size <= MAX_CONSTRAINT_BYTES, allowed)
    if given and params.allowed_token_ids:
        check.require("allowed_token_ids", "ids", False, f"not together with {given[0]}")
