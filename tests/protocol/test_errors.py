"""Errors: codes, statuses, conversion both ways, pickling."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from sagellm_protocol import (
    Error,
    ErrorCode,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    NotImplementedInBackendError,
    ResourceExhaustedError,
    SageLLMError,
    UnsupportedError,
)

DOCUMENTED = {
    "invalid_argument",
    "resource_exhausted",
    "unavailable",
    "deadline_exceeded",
    "not_implemented",
    "kv_transfer_failed",
    "comm_timeout",
    "comm_group_invalid",
    "distributed_runtime_error",
    "unauthenticated",
    "permission_denied",
    "not_found",
    "cancelled",
    "internal",
}


def family(kind: type[SageLLMError] = SageLLMError) -> list[type[SageLLMError]]:
    own = [child for child in kind.__subclasses__() if child.__module__ == kind.__module__]
    return [kind, *(member for child in own for member in family(child))]


def test_the_codes_are_the_documented_ones() -> None:
    assert {code.value for code in ErrorCode} == DOCUMENTED
    assert str(ErrorCode.NOT_FOUND) == f"{ErrorCode.NOT_FOUND}" == "not_found"


def test_every_code_has_a_status_and_a_class() -> None:
    for code in ErrorCode:
        assert 400 <= code.http_status < 600
        error = SageLLMError.from_error(Error(code=code, message="m"))
        assert type(error).default_code is code
        assert type(error) is not SageLLMError
    assert ErrorCode.INVALID_ARGUMENT.http_status == 400
    assert ErrorCode.RESOURCE_EXHAUSTED.http_status == 429
    assert ErrorCode.INTERNAL.http_status == 500


@pytest.mark.parametrize("kind", family())
def test_conversion_and_pickling_lose_nothing(kind: type[SageLLMError]) -> None:
    error = kind("too\nlong;  cut it", retryable=True, context={"limit": 3}, field="prompt")
    assert str(error) == error.message == "too long; cut it"
    assert error.http_status == error.code.http_status
    wire = Error.model_validate_json(error.to_error().model_dump_json())
    for copy in (pickle.loads(pickle.dumps(error)), wire.to_exception()):
        assert str(copy) == str(error)
        assert (copy.code, copy.retryable, copy.context) == (error.code, True, {"limit": 3, "field": "prompt"})
    assert type(pickle.loads(pickle.dumps(error))) is kind
    if kind is not SageLLMError:
        assert type(wire.to_exception()) is kind


def test_retryable_comes_from_the_code() -> None:
    assert ResourceExhaustedError("full").retryable
    assert not InvalidArgumentError("wrong").retryable
    assert not ResourceExhaustedError("full", retryable=False).retryable
    assert SageLLMError("x", code="unavailable").retryable


def test_the_documented_constructor() -> None:
    error = SageLLMError(code=ErrorCode.NOT_FOUND, message="no model 'x'", retryable=False, context={"model": "x"})
    assert (error.code, error.message, error.retryable, error.context) == (
        ErrorCode.NOT_FOUND,
        "no model 'x'",
        False,
        {"model": "x"},
    )
    assert NotImplementedInBackendError is UnsupportedError


def test_context_becomes_plain_json() -> None:
    error = InternalError("x", path=Path("a") / "b", limit=float("inf"), ids=(1, 2), nested={3: {4}}, nothing=None)
    context = json.loads(error.to_error().model_dump_json())["context"]
    assert context == {"path": "a/b", "limit": "inf", "ids": [1, 2], "nested": {"3": "{4}"}}


def test_the_error_model_speaks_the_protocols_error_too() -> None:
    with pytest.raises(InvalidArgumentError, match="code must be 'invalid_argument', "):
        Error(code="oops", message="m")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x"):
        raise InvalidArgumentError("x")
    assert not issubclass(NotFoundError, ValueError)
