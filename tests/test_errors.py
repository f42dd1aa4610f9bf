"""The exception tree and its table: a code for every class, a status for every code."""

import pytest

from lightllm import errors
from lightllm.bench import http_client, private_server, workload
from lightllm.config_server import etcd
from lightllm.errors import ERROR_CODES, ConfigError, ContextLengthError, LightLLMError

# interfaces: status -> type, and the codes that may occur with it.
STATUS_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


# Where classes of the tree are defined outside errors.py.
ELSEWHERE = (
    etcd.EtcdUnavailable,
    http_client.CallFailed,
    private_server.ServerFailed,
    workload.WorkloadError,
)


def tree(root: type[LightLLMError] = LightLLMError) -> list[type[LightLLMError]]:
    return [root, *(below for child in root.__subclasses__() for below in tree(child))]


def test_every_code_has_status_and_type() -> None:
    assert {kind.status: kind.type for kind in ERROR_CODES.values()} == STATUS_TYPES


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("bad_json", 400),
        ("context_length_exceeded", 400),
        ("invalid_api_key", 401),
        ("model_not_found", 404),
        ("wrong_role", 404),
        ("too_large", 413),
        ("queue_full", 429),
        ("internal", 500),
        ("engine_down", 503),
        ("node_lost", 503),
        ("deadline", 504),
    ],
)
def test_status_of_code(code: str, status: int) -> None:
    assert ERROR_CODES[code].status == status


def test_table_is_read_only() -> None:
    with pytest.raises(TypeError):
        ERROR_CODES["new"] = ERROR_CODES["internal"]  # type: ignore[index]


@pytest.mark.parametrize("kind", tree())
def test_every_class_has_a_known_code(kind: type[LightLLMError]) -> None:
    assert kind.default_code in ERROR_CODES


@pytest.mark.parametrize("kind", tree())
def test_every_class_is_drawn_in_the_docstring(kind: type[LightLLMError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")
    assert kind.__doc__


def test_classes_defined_elsewhere_are_in_the_tree() -> None:
    assert set(ELSEWHERE) <= set(tree())


def test_exit_codes() -> None:
    expected = {"ConfigError": 2, "ModelLoadError": 3, "BindError": 4}
    assert {kind.__name__: kind.exit_code for kind in tree() if kind.exit_code != 1} == expected


def test_fields_are_kept() -> None:
    error = ContextLengthError("too long", param="inputs")
    assert (error.message, str(error), error.code, error.param, error.retry_after_s) == (
        "too long",
        "too long",
        "context_length_exceeded",
        "inputs",
        None,
    )
    assert ConfigError("x", code="not_supported").kind.status == 400


def test_unknown_code_is_our_bug() -> None:
    with pytest.raises(KeyError):
        _ = LightLLMError("x", code="no_such_code").kind
