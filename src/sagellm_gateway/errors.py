"""Errors in the form of the API whose path was called: OpenAI's, Anthropic's or Ollama's.

Also for what fails before a route is reached (a missing key, a full queue, an unknown path), so that each API's client
always finds the error where it looks for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi.responses import Response as HttpResponse

from sagellm_core.http import error_answer, openai_error_body
from sagellm_protocol import ErrorCode, SageLLMError

ANTHROPIC_PATH = "/v1/messages"
OLLAMA_PATH = "/api/"


def error_body_for(path: str, error: SageLLMError) -> dict[str, Any]:
    """The body that tells `error` to who called `path`."""
    if path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/"):
        return anthropic_error_body(error)
    if path.startswith(OLLAMA_PATH):
        return {"error": error.message}
    return openai_error_body(path, error)


def error_answer_for(path: str, error: SageLLMError, http_status: int | None = None) -> HttpResponse:
    """The answer that tells `error` to who called `path`."""
    return error_answer(error, http_status, body=error_body_for(path, error))


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
    kind = _ANTHROPIC_TYPES.get(error.code, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


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
