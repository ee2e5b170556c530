"""Bodies of calls: JSON that names a model, checked against its type."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel

from sagellm_core.http import read_json_object
from sagellm_gateway.context import gateway_of
from sagellm_protocol import parse

CallT = TypeVar("CallT", bound=BaseModel)


async def read_call(http: HttpRequest, kind: type[CallT], *, what: str) -> CallT:
    """The body as a `kind`; a call that names no model means the default one.

    Raises `InvalidArgumentError` that names the field and the remedy.
    """
    body = await read_json_object(http)
    if body.get("model") in (None, "default"):
        body["model"] = gateway_of(http).default_model
    return parse(kind, body, what=what)
