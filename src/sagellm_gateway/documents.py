"""The OpenAPI document: what each route takes, what it answers, and every status that it can give.

Routes read their bodies themselves, so FastAPI cannot know; `described` tells it beside the route::

    @router.post("/v1/completions", response_model=None)
    @described(body=CompletionRequest, answer=Completion, also=EVENTS, fails=GENERATION)
    async def completions(http): ...

Schemas come from the same types that check the bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastapi import APIRouter
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sagellm_gateway.errors import ANTHROPIC_PATH, OLLAMA_PATH
from sagellm_protocol.openai import ErrorResponse

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway

Schema = dict[str, Any]

JSON = "application/json"
EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
PAGE = "text/html"
TEXT = "text/plain"

# What running a model can end in, besides what every call can.
GENERATION = (404, 503, 504)

_ANY_CALL = (400, 401, 403)
_ANY_BODY = (408, 413, 429, 503)
_MEANINGS = {
    200: "The answer.",
    201: "It was made.",
    202: "It has begun.",
    304: "As it was, by its ETag.",
    400: "Something in the request is wrong or not supported; the message names it and the remedy.",
    401: "An API key is missing or not known.",
    403: "The caller may not do this.",
    404: "There is no such thing, such as the model.",
    408: "The body did not come.",
    409: "It cannot be done in this state.",
    413: "The body is too large.",
    429: "A limit is reached; `Retry-After` says when to try again.",
    503: "The server cannot answer now; try again.",
    504: "The request's time ran out.",
}
_TEXT: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
_COMPONENTS = "#/components/schemas/"
_APIS = ("Anthropic", "Ollama", "Responses")

EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])


@dataclass(frozen=True)
class Description:
    """See `described`."""

    body: type[BaseModel] | Schema | None
    answer: type[BaseModel] | None
    media: str | None
    also: str | None
    query: type[BaseModel] | Schema | None
    status: int
    fails: Sequence[int]


def described(
    *,
    body: type[BaseModel] | Schema | None = None,
    answer: type[BaseModel] | None = None,
    media: str | None = JSON,
    also: str | None = None,
    query: type[BaseModel] | Schema | None = None,
    status: int = 200,
    fails: Sequence[int] = (),
) -> Callable[[EndpointT], EndpointT]:
    """Say of an endpoint what the OpenAPI document shall say.

    Args:
        body: the type of its body, or a JSON Schema of it.
        answer: the type of its answer; left out for an object without a fixed form.
        media: the answer's media type; None for an answer without a body.
        also: another that it can have, such as that of a stream.
        query: the type of its query parameters, or a JSON Schema of each by name.
        status: of success.
        fails: statuses besides those that every call with or without a body can give.
    """
    description = Description(body, answer, media, also, query, status, fails)

    def mark(endpoint: EndpointT) -> EndpointT:
        endpoint.openapi = description  # type: ignore[attr-defined]  # read by `description_of`
        return endpoint

    return mark


def description_of(endpoint: Callable[..., Any]) -> Description | None:
    """What `described` said of an endpoint."""
    description = getattr(endpoint, "openapi", None)
    return description if isinstance(description, Description) else None


def openapi_document(gateway: Gateway, routers: Sequence[APIRouter]) -> Schema:
    """The OpenAPI document of a gateway with these routers."""
    document = get_openapi(
        title=gateway.title,
        version=gateway.version,
        description=_ABOUT,
        routes=gateway.routes,
    )
    components = document.setdefault("components", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which nothing here answers
        components.get("schemas", {}).pop(name, None)
    found = list(_described_routes(routers))
    schemas = _Schemas([description for _, _, description in found])
    components.setdefault("schemas", {}).update(schemas.components)
    for path, method, description in found:
        _complete(document["paths"][path][method], path, description, schemas)
    if gateway.settings.auth.keys:
        components["securitySchemes"] = _KEYS
        document["security"] = [{"bearer": []}, {"x-api-key": []}]
    return document


def _described_routes(routers: Sequence[APIRouter]) -> Iterator[tuple[str, str, Description]]:
    for route in (route for router in routers for route in router.routes):
        description = description_of(route.endpoint) if isinstance(route, APIRoute) else None
        if isinstance(route, APIRoute) and description is not None and route.include_in_schema:
            for method in route.methods or ():
                yield route.path_format, method.lower(), description


class _Schemas:
    """The schemas of all types that routes name, and how to refer to them."""

    def __init__(self, descriptions: Sequence[Description]) -> None:
        inputs = {description.body for description in descriptions if isinstance(description.body, type)}
        outputs: set[type[BaseModel]] = {ErrorResponse}
        outputs |= {description.answer for description in descriptions if description.answer is not None}
        wanted: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = []
        wanted += [(kind, "validation") for kind in sorted(inputs, key=_name)]
        wanted += [(kind, "serialization") for kind in sorted(outputs, key=_name)]
        references, definitions = models_json_schema(wanted, ref_template=_COMPONENTS + "{model}")
        named: Schema = definitions.get("$defs", {})
        names = {_COMPONENTS + name: _COMPONENTS + _plain_name(name) for name in named}
        assert len(set(names.values())) == len(names), "two types of one API have the same name"
        self.components: Schema = {}
        for name, schema in named.items():
            # Generators of clients call a class by its title.
            title = {"title": _plain_name(name)} if "title" in schema else {}
            self.components[_plain_name(name)] = {**_renamed(schema, names), **title}
        self._inputs = {kind: _renamed(ref, names) for (kind, mode), ref in references.items() if mode == "validation"}
        self._outputs = {
            kind: _renamed(ref, names) for (kind, mode), ref in references.items() if mode == "serialization"
        }

    def of_body(self, body: type[BaseModel] | Schema) -> Schema:
        return self._inputs[body] if isinstance(body, type) else body

    def of_answer(self, answer: type[BaseModel] | None) -> Schema:
        return _OBJECT if answer is None else self._outputs[answer]


def _name(kind: type[BaseModel]) -> str:
    return kind.__name__


def _plain_name(name: str) -> str:
    """The name of a type with that of its API in front where several have one: `OllamaToolCall`, `ToolCallInput`."""
    *modules, kind = name.split("__")
    return "".join(api for api in _APIS if api.lower() in modules) + kind.replace("-", "")


def _renamed(schema: Any, names: Mapping[str, str]) -> Any:
    if isinstance(schema, dict):
        return {key: _renamed(value, names) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_renamed(value, names) for value in schema]
    return names.get(schema, schema) if isinstance(schema, str) else schema


def _complete(operation: Schema, path: str, description: Description, schemas: _Schemas) -> None:
    if description.body is not None:
        content = {JSON: {"schema": schemas.of_body(description.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    if description.query is not None:
        operation["parameters"] = [*operation.get("parameters", ()), *_query_parameters(description.query)]
    media = [kind for kind in (description.media, description.also) if kind is not None]
    success = schemas.of_answer(description.answer)
    # A stream of events is read as text by some and as objects by others, so it has no type.
    shapes: dict[str, Schema] = {JSON: success, EVENTS: {}}
    forms = {kind: {"schema": shapes.get(kind, _TEXT)} for kind in media}
    answers: dict[int, Any] = {description.status: {"description": _MEANINGS[description.status], "content": forms}}
    error = {JSON: {"schema": _error_schema(path, schemas)}}
    for status in sorted({*_ANY_CALL, *(_ANY_BODY if description.body is not None else ()), *description.fails}):
        answers[status] = {"description": _MEANINGS[status], "content": {} if status == 304 else error}
    operation["responses"] = {str(status): answer for status, answer in answers.items()}


def _query_parameters(query: type[BaseModel] | Schema) -> Iterator[Schema]:
    properties = query.model_json_schema().get("properties", {}) if isinstance(query, type) else query
    for name, schema in properties.items():
        yield {"name": name, "in": "query", "required": False, "schema": schema}


def _error_schema(path: str, schemas: _Schemas) -> Schema:
    if path.startswith(OLLAMA_PATH):
        return {"type": "object", "properties": {"error": _TEXT}, "required": ["error"]}
    if path.startswith(ANTHROPIC_PATH):
        error = {"type": "object", "properties": {"type": _TEXT, "message": _TEXT}, "required": ["type", "message"]}
        return {"type": "object", "properties": {"type": {"const": "error"}, "error": error}, "required": ["error"]}
    return schemas.of_answer(ErrorResponse)


_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_ABOUT = """\
OpenAI's API, with Anthropic's `/v1/messages` and Ollama's `/api`.

Every call may carry `x-request-id` and `traceparent` (W3C Trace Context); calls that run a model also `x-priority`
(critical, high, normal, low, background), `x-slo-ttft-ms`, `x-slo-tpot-ms` and `x-slo-deadline-ms`. Every answer has
`x-request-id`; where limits are configured, it has `x-ratelimit-*`.
"""
