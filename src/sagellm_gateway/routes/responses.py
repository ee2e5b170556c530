"""`/v1/responses`: answers with a memory, in OpenAI's newer form."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse
from pydantic import Field

from sagellm_core.http import start_event_stream, while_connected
from sagellm_gateway.body import read_call
from sagellm_gateway.context import caller_of, gateway_of
from sagellm_gateway.documents import EVENTS, GENERATION, described
from sagellm_gateway.errors import naming
from sagellm_gateway.responses.render import EventWriter
from sagellm_gateway.responses.service import Conversation, input_items
from sagellm_gateway.responses.store import StoredResponse
from sagellm_gateway.responses.translate import CHAT_FIELDS
from sagellm_gateway.responses.types import ItemId, ResponsesRequest
from sagellm_gateway.streams import FramedEvents, whole, written
from sagellm_protocol import InvalidArgumentError, UnsupportedError, parse
from sagellm_protocol.model import EdgeModel

router = APIRouter(tags=["OpenAI"])

_encode = msgspec.json.Encoder().encode


class InputItemsQuery(EdgeModel):
    """Which of a response's input items to list."""

    after: ItemId | None = None
    limit: int = Field(default=20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"


@router.post("/v1/responses", response_model=None)
@described(body=ResponsesRequest, also=EVENTS, fails=GENERATION)
async def create_response(http: HttpRequest) -> HttpResponse:
    """Answer a conversation, and remember it unless `store` is false."""
    call = await read_call(http, ResponsesRequest, what="response request")
    gateway, caller = gateway_of(http), caller_of(http)
    conversation = Conversation(call, gateway.responses, caller.key_name)
    with naming(CHAT_FIELDS):
        chat_call = conversation.to_chat()
        if call.stream:
            writer = EventWriter(conversation.draft, conversation.keep)
            return await start_event_stream(http, written(gateway.chat.stream(chat_call, caller), writer), FramedEvents)
        answer = await whole(http, gateway.chat.answer(chat_call, caller))
    body = conversation.draft.add_answer(answer)
    conversation.keep(body)
    return _json(body)


@router.post("/v1/responses/input_tokens", response_model=None)
@described(body=ResponsesRequest, fails=GENERATION)
async def count_input_tokens(http: HttpRequest) -> HttpResponse:
    """How many tokens the prompt of a request for a response has; nothing is generated or stored."""
    call = await read_call(http, ResponsesRequest, what="token count request")
    gateway, caller = gateway_of(http), caller_of(http)
    conversation = Conversation(call, gateway.responses, caller.key_name)
    with naming(CHAT_FIELDS):
        count = gateway.chat.count_prompt_tokens(conversation.to_chat(), caller)
        return _json({"object": "response.input_tokens", "input_tokens": await while_connected(http, count)})


@router.post("/v1/responses/compact", response_model=None)
@described()
async def compact_response(http: HttpRequest) -> HttpResponse:
    """Conversations are not made shorter here; whoever sends them chooses what stays."""
    raise UnsupportedError("compaction is not supported here; send the part of the conversation that matters")


@router.get("/v1/responses/{response_id}", response_model=None)
@described(fails=(404,))
async def get_response(http: HttpRequest, response_id: str) -> HttpResponse:
    """A stored response."""
    if http.query_params.get("stream") == "true":
        raise UnsupportedError("stream is not supported for a stored response; read it as a whole", field="stream")
    return HttpResponse(_stored(http, response_id).body, media_type="application/json")


@router.delete("/v1/responses/{response_id}", response_model=None)
@described(fails=(404,))
async def delete_response(http: HttpRequest, response_id: str) -> HttpResponse:
    """Forget a stored response; those that continue it keep their conversation."""
    gateway_of(http).responses.delete(caller_of(http).key_name, response_id)
    return _json({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel", response_model=None)
@described(fails=(404,))
async def cancel_response(http: HttpRequest, response_id: str) -> HttpResponse:
    """A stored response has ended; there are none in the background."""
    _stored(http, response_id)
    raise InvalidArgumentError(
        f"response {response_id!r} has ended and cannot be cancelled; close the stream of one that has not",
        field="response_id",
    )


@router.get("/v1/responses/{response_id}/input_items", response_model=None)
@described(query=InputItemsQuery, fails=(404,))
async def list_input_items(http: HttpRequest, response_id: str) -> HttpResponse:
    """What the request of a stored response gave as input, the latest first."""
    given = {name: value for name, value in http.query_params.items() if not name.startswith("include")}
    query = parse(InputItemsQuery, given, what="query")
    items = input_items(_stored(http, response_id))
    if query.order == "desc":
        items.reverse()
    if query.after is not None:
        items = items[_index_after(items, query.after) :]
    page = items[: query.limit]
    return _json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > len(page),
        }
    )


def _stored(http: HttpRequest, response_id: str) -> StoredResponse:
    return gateway_of(http).responses.get(caller_of(http).key_name, response_id)


def _index_after(items: list[dict[str, Any]], item_id: str) -> int:
    for index, item in enumerate(items):
        if item["id"] == item_id:
            return index + 1
    raise InvalidArgumentError(f"after: the response has no input item {item_id!r}; use one of its ids", field="after")


def _json(body: Any) -> HttpResponse:
    return HttpResponse(_encode(body), media_type="application/json")
