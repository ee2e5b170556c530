"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse

from sagellm_core.http import DONE, JsonText, start_event_stream, while_connected
from sagellm_gateway.body import BodyParser, read_body
from sagellm_gateway.chat import ChatService
from sagellm_gateway.chat_render import ChunkWriter, answer_body
from sagellm_gateway.context import Caller, caller_of, gateway_of
from sagellm_gateway.documents import EVENTS, GENERATION, described
from sagellm_protocol.openai import ChatCompletion, ChatCompletionRequest

router = APIRouter(tags=["OpenAI"])
_parse = BodyParser(ChatCompletionRequest, "messages")


@router.post("/v1/chat/completions", response_model=None)
@described(body=ChatCompletionRequest, answer=ChatCompletion, also=EVENTS, fails=GENERATION)
async def chat_completions(http: HttpRequest) -> HttpResponse:
    """Answer a conversation."""
    return await answer_chat(http, _parse(await read_body(http), what="chat completion request"))


async def answer_chat(http: HttpRequest, call: ChatCompletionRequest) -> HttpResponse:
    """The answer to `call`, whole or streamed as it asks."""
    chat, caller = gateway_of(http).chat, caller_of(http)
    if call.stream:
        return await start_event_stream(http, _messages(chat, call, caller))
    answer = await while_connected(http, chat.answer(call, caller))
    return JsonText(answer_body(call.model, answer))


async def _messages(chat: ChatService, call: ChatCompletionRequest, caller: Caller) -> AsyncGenerator[bytes, None]:
    options = call.stream_options
    writer = ChunkWriter(
        call.model,
        num_choices=call.n or 1,
        include_usage=options is not None and options.include_usage,
        counts_usage=options is not None and options.counts_usage,
    )
    async with aclosing(chat.stream(call, caller)) as pieces:
        async for piece in pieces:
            message = writer.write(piece)
            if message:
                yield message
    yield DONE
