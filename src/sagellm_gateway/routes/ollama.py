"""`/api/...`: Ollama's API."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse

from sagellm_control_plane import EngineState
from sagellm_core.http import start_event_stream, while_connected
from sagellm_gateway.body import read_call
from sagellm_gateway.context import caller_of, gateway_of
from sagellm_gateway.documents import GENERATION, LINES, described
from sagellm_gateway.embeddings import Embeddings, embed
from sagellm_gateway.errors import naming
from sagellm_gateway.ollama.models import can_think, find_model, running_entry, show_body, tag_entry
from sagellm_gateway.ollama.render import LineWriter, answer_body, embed_body, loaded_body
from sagellm_gateway.ollama.translate import CHAT_FIELDS, to_chat
from sagellm_gateway.ollama.types import ChatCall, EmbedCall, EmbeddingsCall, GenerateCall, PullCall, ShowCall
from sagellm_gateway.routes.models import model_cards
from sagellm_gateway.streams import JsonLines, whole, written
from sagellm_protocol import UnsupportedError, Usage

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway

router = APIRouter(tags=["Ollama"])

# The version of the API that is spoken: clients test it before they use what is newer.
API_VERSION = "0.12.6"

_TO_WHAT_FITS = -1  # texts that are too long are cut

_encode = msgspec.json.Encoder().encode


@router.post("/api/chat", response_model=None)
@described(body=ChatCall, also=LINES, fails=GENERATION)
async def chat(http: HttpRequest) -> HttpResponse:
    """Answer a conversation."""
    call = await read_call(http, ChatCall, what="chat request", keeps_tag=True)
    return await _answer(http, call, is_empty=not call.messages)


@router.post("/api/generate", response_model=None)
@described(body=GenerateCall, also=LINES, fails=GENERATION)
async def generate(http: HttpRequest) -> HttpResponse:
    """Answer a prompt."""
    call = await read_call(http, GenerateCall, what="generate request", keeps_tag=True)
    return await _answer(http, call, is_empty=not call.prompt)


@router.post("/api/embed", response_model=None)
@described(body=EmbedCall, fails=GENERATION)
async def embed_texts(http: HttpRequest) -> HttpResponse:
    """Make a vector of each text."""
    started_at = time.monotonic_ns()
    call = await read_call(http, EmbedCall, what="embed request", keeps_tag=True)
    gateway = gateway_of(http)
    card = find_model(model_cards(gateway), call.model)
    truncate = None if call.truncate is False else _TO_WHAT_FITS
    made = Embeddings([], Usage())
    if call.input:
        work = embed(gateway, call.input, model=card.id, dimensions=call.dimensions, truncate_prompt_tokens=truncate)
        made = await while_connected(http, work)
    return _object(await embed_body(call.model, made, started_at))


@router.post("/api/embeddings", response_model=None)
@described(body=EmbeddingsCall, fails=GENERATION)
async def embed_prompt(http: HttpRequest) -> HttpResponse:
    """Make a vector of one text; the older form."""
    call = await read_call(http, EmbeddingsCall, what="embeddings request", keeps_tag=True)
    gateway = gateway_of(http)
    card = find_model(model_cards(gateway), call.model)
    if not call.prompt:
        return _object(_encode({"embedding": []}))
    work = embed(gateway, call.prompt, model=card.id, truncate_prompt_tokens=_TO_WHAT_FITS, field="prompt")
    made = await while_connected(http, work)
    return _object(_encode({"embedding": made.vectors[0]}))


@router.post("/api/pull", response_model=None)
@described(body=PullCall, also=LINES, fails=(404,))
async def pull(http: HttpRequest) -> HttpResponse:
    """Say that a served model is there; nothing is downloaded."""
    call = await read_call(http, PullCall, what="pull request", keeps_tag=True)
    find_model(model_cards(gateway_of(http)), call.name or call.model)
    return _object(_encode({"status": "success"}), as_line=call.stream is not False)


@router.get("/api/tags", response_model=None)
@described()
async def tags(http: HttpRequest) -> HttpResponse:
    """The models that can be asked for."""
    gateway = gateway_of(http)
    loaded = _loaded(gateway)
    entries = []
    for name, card in model_cards(gateway).items():
        description = await gateway.manager.describe_model(name) if name in loaded else None
        entries.append(tag_entry(card, description))
    return _object(_encode({"models": entries}))


@router.get("/api/ps", response_model=None)
@described()
async def ps(http: HttpRequest) -> HttpResponse:
    """The models that are in memory."""
    gateway = gateway_of(http)
    cards, entries = model_cards(gateway), []
    for name, engine_id in _loaded(gateway).items():
        backend = gateway.manager.get_engine_details(engine_id).get("backend", "cpu")
        description = await gateway.manager.describe_model(name)
        entries.append(running_entry(cards[name], description, is_on_cpu=backend == "cpu"))
    return _object(_encode({"models": entries}))


@router.post("/api/show", response_model=None)
@described(body=ShowCall, fails=(404, 503))
async def show(http: HttpRequest) -> HttpResponse:
    """What a model is."""
    call = await read_call(http, ShowCall, what="show request", keeps_tag=True)
    gateway = gateway_of(http)
    card = find_model(model_cards(gateway), call.name or call.model)
    description = await while_connected(http, gateway.manager.describe_model(card.id))
    return _object(_encode(show_body(card, description)))


@router.get("/api/version", response_model=None)
@described()
async def version(http: HttpRequest) -> HttpResponse:
    """The version of Ollama's API that is spoken."""
    return _object(_encode({"version": API_VERSION}))


async def _answer(http: HttpRequest, call: ChatCall | GenerateCall, *, is_empty: bool) -> HttpResponse:
    gateway, caller = gateway_of(http), caller_of(http)
    card = find_model(model_cards(gateway), call.model)
    if is_empty:
        if call.would_unload:
            raise UnsupportedError("keep_alive=0 cannot unload a model here; stop its engine", field="keep_alive")
        return _object(loaded_body(call), as_line=call.is_streamed)
    if call.think is True and not can_think((await gateway.manager.describe_model(card.id)).chat_template):
        raise UnsupportedError(f"{card.id} does not support thinking; leave think out", field="think")
    with naming(CHAT_FIELDS):
        chat_call = to_chat(call, model=card.id)
        if call.is_streamed:
            lines = written(gateway.chat.stream(chat_call, caller), LineWriter(call))
            return await start_event_stream(http, lines, JsonLines)
        answer = await whole(http, gateway.chat.answer(chat_call, caller))
    return _object(answer_body(call, answer))


def _loaded(gateway: Gateway) -> dict[str, str]:
    """The models in memory, each with one of its engines."""
    engines = gateway.manager.list_engines()
    return {info.model: info.engine_id for info in engines if info.state is EngineState.READY}


def _object(body: bytes, *, as_line: bool = False) -> HttpResponse:
    """One object, or the only line of a stream."""
    if as_line:
        return HttpResponse(body + b"\n", media_type=JsonLines.media_type)
    return HttpResponse(body, media_type="application/json")
