"""Bodies of calls: JSON that names a model, checked against its type."""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar, cast

from fastapi import Request as HttpRequest
from pydantic import BaseModel, TypeAdapter, ValidationError

from sagellm_core.http import read_json_object
from sagellm_gateway.context import gateway_of
from sagellm_gateway.writing import encode
from sagellm_protocol import parse
from sagellm_protocol.model import ProtocolModel

CallT = TypeVar("CallT", bound=BaseModel)
ModelT = TypeVar("ModelT", bound=ProtocolModel)

LATEST = ":latest"  # the tag that Ollama's API shows with every name; its clients ask the other APIs by it, too

_MAX_KNOWN = 256
_MAX_KNOWN_BYTES = 1024


async def read_call(http: HttpRequest, kind: type[CallT], *, what: str, keeps_tag: bool = False) -> CallT:
    """The body as a `kind`; a call that names no model means the default one.

    A served model may be named with the tag `latest`, which is taken off unless the call `keeps_tag`. Raises
    `InvalidArgumentError` that names the field and the remedy.
    """
    return parse(kind, await read_body(http, keeps_tag=keeps_tag), what=what)


async def read_body(http: HttpRequest, *, keeps_tag: bool = False) -> dict[str, Any]:
    """The JSON object in the body, as `read_call` has it checked."""
    body = await read_json_object(http)
    name = body.get("model")
    if name in (None, "default"):
        body["model"] = gateway_of(http).default_model
    elif not keeps_tag and isinstance(name, str) and name.endswith(LATEST):
        served = {info.model for info in gateway_of(http).manager.list_engines()}
        untagged = name.removesuffix(LATEST)
        body["model"] = untagged if name not in served and untagged in served else name
    return body


class BodyParser(Generic[ModelT]):
    """As `parse`, at half the cost for bodies of a type that mostly differ in one field, such as the conversation.

    Of most clients the rest is the same in every call, so the last ones are kept, validated, with what validators have
    derived of them. None of these may bring `field` together with others. Whatever is refused goes through `parse`,
    which says why.
    """

    def __init__(self, kind: type[ModelT], field: str) -> None:
        info = kind.model_fields[field]
        self._kind = kind
        self._field = field
        bounded = info.annotation, *info.metadata
        self._validator = TypeAdapter[Any](cast("Any", Annotated)[bounded]).validator
        self._known: dict[bytes, ModelT] = {}  # by the JSON of all but the field

    def __call__(self, body: dict[str, Any], *, what: str) -> ModelT:
        """`body` as a value of the type; raises `InvalidArgumentError` as `parse`."""
        field = self._field
        if field not in body:
            return parse(self._kind, body, what=what)
        value = body.pop(field)
        key = encode(body)
        known = self._known.get(key)
        body[field] = value
        if known is None:
            call = parse(self._kind, body, what=what)
            self._keep(key, call)
            return call
        try:
            value = self._validator.validate_python(value)
        except ValidationError:
            return parse(self._kind, body, what=what)
        return known.model_copy(update={field: value})

    def _keep(self, key: bytes, call: ModelT) -> None:
        if len(key) > _MAX_KNOWN_BYTES or not self._is_constant(call):
            return
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[key] = call.model_copy(update={self._field: None})  # what was said is not kept

    def _is_constant(self, call: ModelT) -> bool:
        """Whether nobody can change what calls would share."""
        try:
            hash(tuple(value for name, value in call if name != self._field))
        except TypeError:
            return False
        return True
