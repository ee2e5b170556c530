"""One error vocabulary: codes on the wire, one exception family in Python.

::

    SageLLMError                       any code; the base to catch
    ├── InvalidArgumentError           invalid_argument      (also a ValueError)
    ├── UnauthenticatedError           unauthenticated
    ├── PermissionDeniedError          permission_denied
    ├── NotFoundError                  not_found
    ├── ResourceExhaustedError         resource_exhausted
    ├── UnavailableError               unavailable
    ├── DeadlineExceededError          deadline_exceeded
    ├── RequestCancelledError          cancelled
    ├── UnsupportedError               not_implemented       (alias NotImplementedInBackendError)
    ├── KVTransferError                kv_transfer_failed
    ├── CommTimeoutError               comm_timeout
    ├── CommGroupError                 comm_group_invalid
    ├── DistributedRuntimeError        distributed_runtime_error
    └── InternalError                  internal

An exception becomes an :class:`Error` where it leaves a process (``to_error``) and an exception of the same class again
where it enters the next (``SageLLMError.from_error``). ``str(error)`` is one line that names the field or file and the
remedy; details for programs stand in ``context``. All exceptions pickle if their context does.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, JsonValue

from sagellm_protocol.model import ProtocolEnum, ProtocolModel


class ErrorCode(ProtocolEnum):
    """Why something failed, as it stands on the wire."""

    INVALID_ARGUMENT = "invalid_argument"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    NOT_FOUND = "not_found"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    CANCELLED = "cancelled"
    INTERNAL = "internal"
    NOT_IMPLEMENTED = "not_implemented"
    UNAVAILABLE = "unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    KV_TRANSFER_FAILED = "kv_transfer_failed"
    COMM_TIMEOUT = "comm_timeout"
    COMM_GROUP_INVALID = "comm_group_invalid"
    DISTRIBUTED_RUNTIME_ERROR = "distributed_runtime_error"

    @property
    def http_status(self) -> int:
        """The HTTP status that carries this code (499 is the customary one for a client that went away)."""
        return _HTTP_STATUS[self.value]

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later without a change; an error's default."""
        return self.value in _RETRYABLE


_HTTP_STATUS = {
    "invalid_argument": 400,
    "unauthenticated": 401,
    "permission_denied": 403,
    "not_found": 404,
    "resource_exhausted": 429,
    "cancelled": 499,
    "internal": 500,
    "comm_group_invalid": 500,
    "distributed_runtime_error": 500,
    "not_implemented": 400,  # not 501: a client that sends the same again would be told the same
    "unavailable": 503,
    "kv_transfer_failed": 503,
    "deadline_exceeded": 504,
    "comm_timeout": 504,
}
_RETRYABLE = frozenset({"resource_exhausted", "unavailable", "kv_transfer_failed", "comm_timeout"})


class Error(ProtocolModel):
    """An error on the wire: what a Response, a stream's end or an HTTP answer carries."""

    code: ErrorCode
    message: str = Field(description="One line that names the cause and the remedy.")
    retryable: bool = Field(default=False, description="Whether the same request may succeed later without a change.")
    context: dict[str, JsonValue] = Field(default_factory=dict, description="Details for programs, e.g. `field`.")

    def to_exception(self) -> SageLLMError:
        """Return the exception that this error stands for."""
        return SageLLMError.from_error(self)


class SageLLMError(Exception):
    """The base of every error that sageLLM raises on purpose.

    Args:
        message: what is wrong and what to do; folded into one line.
        code: defaults to the class's code.
        retryable: defaults to the code's ``retryable``.
        context: details for programs; keep them plain values, so that they pickle and serialise.
        details: more context, by keyword: ``InvalidArgumentError("...", field="temperature")``.
    """

    default_code: ClassVar[ErrorCode] = ErrorCode.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        code: ErrorCode | str | None = None,
        retryable: bool | None = None,
        context: dict[str, Any] | None = None,
        **details: Any,
    ) -> None:
        self.message = " ".join(str(message).split())
        super().__init__(self.message)
        self.code = self.default_code if code is None else ErrorCode(code)
        self.retryable = self.code.retryable if retryable is None else retryable
        self.context: dict[str, Any] = {**(context or {}), **details}

    @property
    def http_status(self) -> int:
        """The HTTP status of the error's code."""
        return self.code.http_status

    def to_error(self) -> Error:
        """Return the wire form; context values that JSON doesn't know are given as their ``str``."""
        context = {str(name): _plain(value) for name, value in self.context.items() if value is not None}
        return Error(code=self.code, message=self.message, retryable=self.retryable, context=context)

    @classmethod
    def from_error(cls, error: Error) -> SageLLMError:
        """Return an exception of the class that belongs to ``error.code``."""
        kind = _CLASS_OF_CODE.get(error.code, SageLLMError)
        return kind(error.message, code=error.code, retryable=error.retryable, context=dict(error.context))


class InvalidArgumentError(SageLLMError, ValueError):
    """A value given by the caller is wrong; the message names the field and the remedy."""

    default_code = ErrorCode.INVALID_ARGUMENT


class UnauthenticatedError(SageLLMError):
    """Credentials are missing or not known."""

    default_code = ErrorCode.UNAUTHENTICATED


class PermissionDeniedError(SageLLMError):
    """The caller is known but may not do this."""

    default_code = ErrorCode.PERMISSION_DENIED


class NotFoundError(SageLLMError):
    """A named thing (model, file, request, session, engine) doesn't exist."""

    default_code = ErrorCode.NOT_FOUND


class ResourceExhaustedError(SageLLMError):
    """Memory, KV blocks, queue room or a rate limit ran out."""

    default_code = ErrorCode.RESOURCE_EXHAUSTED


class UnavailableError(SageLLMError):
    """The service or device can't answer now: starting, draining, stopped, or not reachable."""

    default_code = ErrorCode.UNAVAILABLE


class DeadlineExceededError(SageLLMError):
    """The request's time ran out."""

    default_code = ErrorCode.DEADLINE_EXCEEDED


class RequestCancelledError(SageLLMError):
    """The caller gave the request up (not ``asyncio.CancelledError``, which is about tasks)."""

    default_code = ErrorCode.CANCELLED


class UnsupportedError(SageLLMError):
    """This model, backend or build can't do what was asked; the message says which one can."""

    default_code = ErrorCode.NOT_IMPLEMENTED


class KVTransferError(SageLLMError):
    """Moving a request's KV cache between engines failed."""

    default_code = ErrorCode.KV_TRANSFER_FAILED


class CommTimeoutError(SageLLMError):
    """A collective or point-to-point operation didn't finish in time."""

    default_code = ErrorCode.COMM_TIMEOUT


class CommGroupError(SageLLMError):
    """A communication group is wrong: unknown, of the wrong size, or without this rank."""

    default_code = ErrorCode.COMM_GROUP_INVALID


class DistributedRuntimeError(SageLLMError):
    """A worker died or workers disagree."""

    default_code = ErrorCode.DISTRIBUTED_RUNTIME_ERROR


class InternalError(SageLLMError):
    """A fault of sageLLM itself."""

    default_code = ErrorCode.INTERNAL


NotImplementedInBackendError = UnsupportedError

_CLASS_OF_CODE: dict[ErrorCode, type[SageLLMError]] = {
    kind.default_code: kind
    for kind in (
        InvalidArgumentError,
        UnauthenticatedError,
        PermissionDeniedError,
        NotFoundError,
        ResourceExhaustedError,
        UnavailableError,
        DeadlineExceededError,
        RequestCancelledError,
        UnsupportedError,
        KVTransferError,
        CommTimeoutError,
        CommGroupError,
        DistributedRuntimeError,
        InternalError,
    )
}


def _plain(value: Any) -> JsonValue:
    """Return ``value`` as something JSON knows."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if abs(value) != float("inf") and value == value else str(value)
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value)
