"""The exception tree of lightllm and the table of error codes.

    LightLLMError
     +- ConfigError            a flag, environment variable or combination of them   (process exit 2)
     +- ModelLoadError         the model cannot be loaded                            (process exit 3)
     +- BindError              a port or address cannot be bound                     (process exit 4)
     +- RequestError           the caller's fault
     |   +- ContextLengthError     prompt + output do not fit
     |   +- InvalidSamplingParams  a sampling field is out of range
     +- CapacityError          queue full, draining, no node: try again later
     +- EngineError            our fault, or a failed step
     |   +- WorkerDied             the engine or one of its ranks is gone
     |   +- KVTransferError        KV could not be moved between nodes
     |   |   +- LaneUnavailable        by this way of --kv_transport; in transfer/lane
     |   +- DeadlineExceeded       the request's deadline passed first
     +- ClusterError           a node link was refused or lost
     |   +- LinkRefused, LinkBroken, WebSocketRefused   in cluster_link and web_socket
     |   +- EtcdUnavailable        in config_server/etcd
     +- CallFailed, WorkloadError, ServerFailed   of the programs in bench/: a call, its prompts, its server

Every error that can reach a client carries a `code` from `ERROR_CODES`; that table alone maps codes to
HTTP status and OpenAI error type. Imports nothing but the standard library; used by every process.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class ErrorKind(NamedTuple):
    """What a code means on the wire."""

    status: int
    type: str


def _kinds() -> dict[str, ErrorKind]:
    groups: list[tuple[int, str, str]] = [
        (400, "invalid_request_error", "bad_json missing_field wrong_type out_of_range unknown_field"),
        (400, "invalid_request_error", "not_supported context_length_exceeded bad_schema"),
        (401, "authentication_error", "invalid_api_key"),
        (404, "not_found_error", "not_found model_not_found not_implemented wrong_role"),
        (405, "invalid_request_error", "method_not_allowed"),
        (408, "timeout_error", "body_timeout"),
        (413, "invalid_request_error", "too_large"),
        (415, "invalid_request_error", "bad_content_type"),
        (429, "rate_limit_error", "queue_full"),
        (431, "invalid_request_error", "headers_too_large"),
        (500, "server_error", "internal"),
        (503, "server_error", "loading draining engine_down no_nodes node_lost store_down"),
        (503, "server_error", "kv_full kv_transfer_failed lease_expired"),
        (504, "timeout_error", "deadline"),
    ]
    return {code: ErrorKind(status, kind) for status, kind, codes in groups for code in codes.split()}


ERROR_CODES: Mapping[str, ErrorKind] = MappingProxyType(_kinds())


class LightLLMError(Exception):
    """Base of all errors raised on purpose by lightllm.

    Args:
        message: what was wrong, what was got, the limit and the remedy, in one readable sentence or two.
        code: a key of `ERROR_CODES`; the class's default when left out.
        param: the request field at fault, as the client wrote it (`parameters.top_p`).
        retry_after_s: whole seconds after which trying again makes sense.
    """

    default_code = "internal"
    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> ErrorKind:
        """HTTP status and OpenAI type of this error."""
        return ERROR_CODES[self.code]


class ConfigError(LightLLMError):
    """A flag or environment variable is wrong, or two of them contradict each other."""

    exit_code = 2


class ModelLoadError(LightLLMError):
    """The model folder or file is missing, damaged or of an unknown kind."""

    exit_code = 3


class BindError(LightLLMError):
    """The HTTP address cannot be bound."""

    exit_code = 4


class RequestError(LightLLMError):
    """The request is wrong; nothing was computed for it."""

    default_code = "wrong_type"


class ContextLengthError(RequestError):
    """Prompt and requested output exceed the limit in force."""

    default_code = "context_length_exceeded"


class InvalidSamplingParams(RequestError):
    """A sampling field is outside its range."""

    default_code = "out_of_range"


class CapacityError(LightLLMError):
    """No room now; the request may be sent again later."""

    default_code = "queue_full"


class EngineError(LightLLMError):
    """The engine failed while it held the request."""


class WorkerDied(EngineError):
    """The engine process or one of its ranks has died."""

    default_code = "engine_down"


class KVTransferError(EngineError):
    """KV could not be moved to or from a peer; `fault` is the reason in one word, of `messages.KV_FAULTS`."""

    def __init__(self, message: str, *, fault: str = "other") -> None:
        super().__init__(message)
        self.fault = fault


class DeadlineExceeded(EngineError):
    """The deadline of the request passed before its answer was complete."""

    default_code = "deadline"


class ClusterError(LightLLMError):
    """A link to another node was refused or lost."""

    default_code = "node_lost"
