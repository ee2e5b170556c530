"""`/sessions`: conversations that the gateway keeps. A caller sees its own only; docs/sessions.md tells how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse
from pydantic import Field

from sagellm_core.http import read_json_object
from sagellm_gateway.context import caller_of, gateway_of
from sagellm_gateway.documents import EVENTS, GENERATION, described
from sagellm_gateway.routes.chat import answer_chat
from sagellm_gateway.sessions import Session, SessionHead
from sagellm_protocol import ChatMessage, EdgeModel, InvalidArgumentError, parse
from sagellm_protocol.messages import MAX_MESSAGES
from sagellm_protocol.model import Remedy
from sagellm_protocol.openai import ChatCompletion, ChatCompletionRequest

router = APIRouter(prefix="/sessions", tags=["Sessions"])

# It stands in paths.
SessionId = Annotated[
    str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$"), Remedy("use 1 to 128 letters, digits, underscores, dots or dashes")
]
Title = Annotated[str, Field(min_length=1, max_length=200)]
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
Messages = Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES)]


class NewSession(EdgeModel):
    """The body of `POST /sessions`; all of it may be left out."""

    id: SessionId | None = None
    title: Title | None = None
    model: ModelName | None = None
    messages: Messages = Field(default_factory=list)


class SessionChange(EdgeModel):
    """The body of `PATCH /sessions/{id}`: what is given is changed."""

    title: Title | None = None
    model: ModelName | None = None


class SessionCut(EdgeModel):
    """The body of `POST /sessions/{id}/clear`."""

    keep: int = Field(default=0, ge=0, le=MAX_MESSAGES, description="Messages to keep, from the first on.")


class ExportedSession(EdgeModel):
    """A session as `export` gives it and `import` takes it."""

    object: Literal["session.export"] = "session.export"
    version: Literal[1] = 1
    title: str = Field(default="", max_length=200)
    model: ModelName | None = None
    created_at: int | None = Field(
        default=None, ge=0, description="When the exported session was made; told, not kept."
    )
    messages: Messages


# For the document: what is read by hand.
_LIST_QUERY = {"limit": {"type": "integer", "minimum": 1, "maximum": 100}, "after": {"type": "string"}}
_MESSAGE = {"type": "object", "properties": {"content": {"type": "string"}}, "required": ["content"]}


@router.post("", response_model=None)
@described(body=NewSession, status=201, fails=(404, 409))
async def create(http: HttpRequest) -> HttpResponse:
    """Begin a session."""
    call = parse(NewSession, await _body(http), what="session")
    session = await gateway_of(http).sessions.create(
        caller_of(http), session_id=call.id, title=call.title, model=call.model, messages=call.messages
    )
    return _json(_whole(session), status=201)


@router.get("", response_model=None)
@described(query=_LIST_QUERY, fails=(404,))
async def list_sessions(http: HttpRequest) -> HttpResponse:
    """The caller's sessions, the last changed first: `limit` of them (20, at most 100), those behind `after`."""
    query = http.query_params
    limit = _limit(query.get("limit", "20"))
    heads = await gateway_of(http).sessions.heads(caller_of(http), limit=limit + 1, after=query.get("after"))
    data = [_head(head) for head in heads[:limit]]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return _json({"object": "list", "data": data, **ends, "has_more": len(heads) > limit})


@router.post("/import", response_model=None)
@described(body=ExportedSession, status=201)
async def import_session(http: HttpRequest) -> HttpResponse:
    """A new session from an exported one."""
    call = parse(ExportedSession, await read_json_object(http), what="exported session")
    session = await gateway_of(http).sessions.create(
        caller_of(http), title=call.title, model=call.model, messages=call.messages
    )
    return _json(_whole(session), status=201)


@router.get("/{session_id}", response_model=None)
@described(fails=(404,))
async def get(http: HttpRequest, session_id: str) -> HttpResponse:
    """A session with its messages."""
    return _json(_whole(await gateway_of(http).sessions.get(session_id, caller_of(http))))


@router.patch("/{session_id}", response_model=None)
@described(body=SessionChange, fails=(404,))
async def change(http: HttpRequest, session_id: str) -> HttpResponse:
    """Give a session another title or model."""
    fields = parse(SessionChange, await read_json_object(http), what="change of a session").given()
    if fields.get("title", "") is None:
        raise InvalidArgumentError("title must be a text; leave it out to keep it", field="title")
    return _json(_whole(await gateway_of(http).sessions.change(session_id, caller_of(http), **fields)))


@router.delete("/{session_id}", response_model=None)
@described(fails=(404,))
async def delete(http: HttpRequest, session_id: str) -> HttpResponse:
    """Forget a session."""
    await gateway_of(http).sessions.delete(session_id, caller_of(http))
    return _json({"id": session_id, "object": "session.deleted", "deleted": True})


@router.post("/{session_id}/clear", response_model=None)
@described(body=SessionCut, fails=(404,))
async def clear(http: HttpRequest, session_id: str) -> HttpResponse:
    """Forget a session's messages, or those behind the first `keep`."""
    keep = parse(SessionCut, await _body(http), what="clearing of a session").keep
    return _json(_whole(await gateway_of(http).sessions.clear(session_id, caller_of(http), keep=keep)))


@router.get("/{session_id}/export", response_model=None)
@described(fails=(404,))
async def export(http: HttpRequest, session_id: str) -> HttpResponse:
    """A session as a document that `POST /sessions/import` takes."""
    session = await gateway_of(http).sessions.get(session_id, caller_of(http))
    head = session.head
    body = {
        "object": "session.export",
        "version": 1,
        "title": head.title,
        "model": head.model,
        "created_at": int(head.created_at),
        "messages": session.messages,
    }
    answer = _json(body)
    answer.headers["Content-Disposition"] = f'attachment; filename="{head.id}.json"'
    return answer


@router.post("/{session_id}/messages", response_model=None)
@described(body=_MESSAGE, answer=ChatCompletion, also=EVENTS, fails=GENERATION)
async def send(http: HttpRequest, session_id: str) -> HttpResponse:
    """Say something in a session: a chat request with `content`, a text, instead of `messages`."""
    body = await read_json_object(http)
    if "content" in body:
        if "messages" in body:
            raise InvalidArgumentError("content and messages say the same; give only one", field="content")
        body["messages"] = [{"role": "user", "content": body.pop("content")}]
    elif "messages" not in body:
        raise InvalidArgumentError("content is required; give what the user says", field="content")
    if body.get("model") is None:
        session = await gateway_of(http).sessions.get(session_id, caller_of(http))
        body["model"] = session.head.model or gateway_of(http).default_model
    body["session_id"] = session_id
    return await answer_chat(http, parse(ChatCompletionRequest, body, what="message to a session"))


async def _body(http: HttpRequest) -> dict[str, Any]:
    """The JSON object in the body; an empty one where there is no body."""
    is_empty = http.headers.get("content-length", "0") == "0" and "transfer-encoding" not in http.headers
    return {} if is_empty else await read_json_object(http)


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 100:
        raise InvalidArgumentError("limit must be a whole number from 1 to 100", field="limit")
    return int(text)


def _head(head: SessionHead) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": "session",
        "title": head.title,
        "model": head.model,
        "created_at": int(head.created_at),
        "updated_at": int(head.updated_at),
        "num_messages": head.num_messages,
    }


def _whole(session: Session) -> dict[str, Any]:
    return {**_head(session.head), "messages": session.messages}


def _json(value: Any, *, status: int = 200) -> HttpResponse:
    return HttpResponse(msgspec.json.encode(value), status_code=status, media_type="application/json")
