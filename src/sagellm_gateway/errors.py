"""Errors in the form of the API that was called, by path or client: OpenAI's, Anthropic's or Ollama's.

Also for what fails before a route is reached (a missing key, a full queue, an unknown path), so that each API's client
always finds the error where it looks for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi.responses import Response as HttpResponse

from sagellm_core.http import error_answer, no_such_path, openai_error_body
from sagellm_gateway.context import current_caller
from sagellm_protocol import ErrorCode, SageLLMError

ANTHROPIC_PATH = "/v1/messages"
OLLAMA_PATH = "/api/"
_NOT_OFFERED = tuple(
    f"/v1/{name}"
    for name in (
        *("assistants", "audio", "batches", "containers", "evals", "files", "fine_tuning", "images", "moderations"),
        *("realtime", "threads", "uploads", "vector_stores", "videos"),
    )
)


def error_body_for(path: str, error: SageLLMError) -> dict[str, Any]:
    """The body that tells `error` to who called `path`."""
    if path.startswith(OLLAMA_PATH):
        return {"error": error.message}
    caller = current_caller.get()
    speaks_anthropic = caller is not None and caller.speaks_anthropic
    if speaks_anthropic or path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/"):
        return anthropic_error_body(error)
    return openai_error_body(path, error)


def error_answer_for(path: str, error: SageLLMError, http_status: int | None = None) -> HttpResponse:
    """The answer that tells `error` to who called `path`."""
    return error_answer(error, http_status, body=error_body_for(path, error))


def what_instead(path: str, paths: Sequence[str]) -> str:
    """What to tell who called `path`, which there is not; `paths` are those that there are, the shortest first.

    Most often a client's base URL lacks `/v1`, or has it where the client adds it itself.
    """
    for known in paths:
        if len(path) > 1 and len(known) > 1 and (known.endswith(path) or path.endswith(known)):
            return f"there is no such path, but {known}; correct the client's base URL"
    if path.startswith("/v1/conversations"):
        return "conversations are not offered here; continue a response with previous_response_id, or see /sessions"
    if path.startswith(_NOT_OFFERED):
        return "this part of OpenAI's API is not offered here; /docs shows what is"
    return no_such_path(path)


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors from inside name their field as the called API does: `names` maps fields of chat requests to its own.

    A request of another API becomes a chat request; what is wrong with that is told in the caller's words.
    """
    try:
        yield
    except SageLLMError as error:
        field = str(error.context.get("field"))
        head = re.split(r"[.\[]", field, maxsplit=1)[0]
        if head not in names:
            raise
        error.context["field"] = names[head] + field[len(head) :]
        error.message = re.sub(rf"(^|(?<=: ))(the )?{re.escape(head)}\b", names[head], error.message, count=1)
        raise


def anthropic_error_body(error: SageLLMError) -> dict[str, Any]:
    """The form of Anthropic's API, for answers and for events of a stream."""
    body: dict[str, Any] = {"type": _ANTHROPIC_TYPES.get(error.code, "api_error"), "message": error.message}
    if "error_code" in error.context:  # what its clients know a way around
        body["details"] = {"error_code": error.context["error_code"]}
    return {"type": "error", "error": body}


_ANTHROPIC_TYPES = {
    ErrorCode.INVALID_ARGUMENT: "invalid_request_error",
    ErrorCode.NOT_IMPLEMENTED: "invalid_request_error",
    ErrorCode.UNAUTHENTICATED: "authentication_error",
    ErrorCode.PERMISSION_DENIED: "permission_error",
    ErrorCode.NOT_FOUND: "not_found_error",
    ErrorCode.RESOURCE_EXHAUSTED: "rate_limit_error",
    ErrorCode.UNAVAILABLE: "overloaded_error",
    ErrorCode.DEADLINE_EXCEEDED: "timeout_error",
}
