"""`/v1/messages`: Anthropic's API."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse

from sagellm_core.http import start_event_stream, while_connected
from sagellm_gateway.anthropic.render import EventWriter, message_body
from sagellm_gateway.anthropic.translate import CHAT_FIELDS, template_options, to_chat, to_messages, to_tools
from sagellm_gateway.anthropic.types import CountTokensRequest, MessagesRequest
from sagellm_gateway.body import read_call
from sagellm_gateway.context import caller_of, gateway_of
from sagellm_gateway.documents import EVENTS, GENERATION, described
from sagellm_gateway.errors import naming
from sagellm_gateway.streams import PingedEvents, whole, written

router = APIRouter(tags=["Anthropic"])


@router.post("/v1/messages", response_model=None)
@described(body=MessagesRequest, also=EVENTS, fails=GENERATION)
async def messages(http: HttpRequest) -> HttpResponse:
    """Answer a conversation."""
    call = await read_call(http, MessagesRequest, what="message request")
    chat, caller = gateway_of(http).chat, caller_of(http)
    with naming(CHAT_FIELDS):
        chat_call = to_chat(call)
        if call.stream:
            events = written(chat.stream(chat_call, caller), EventWriter(call))
            return await start_event_stream(http, events, PingedEvents)
        answer = await whole(http, chat.answer(chat_call, caller))
    return HttpResponse(message_body(call, answer), media_type="application/json")


@router.post("/v1/messages/count_tokens", response_model=None)
@described(body=CountTokensRequest, fails=(404, 503))
async def count_tokens(http: HttpRequest) -> HttpResponse:
    """How many tokens a prompt has."""
    call = await read_call(http, CountTokensRequest, what="count request")
    options = template_options(call)
    tokens = gateway_of(http).manager.tokenize(
        call.model,
        messages=to_messages(call),
        tools=to_tools(call),
        add_generation_prompt=options.pop("add_generation_prompt", True),
        chat_template_kwargs=options,
    )
    return JSONResponse({"input_tokens": len(await while_connected(http, tokens))})
