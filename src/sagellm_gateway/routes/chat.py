"""`/v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse

from sagellm_core.http import start_event_stream, while_connected
from sagellm_gateway.body import read_call
from sagellm_gateway.chat import answer_chat, refuse_unbuilt, stream_chat
from sagellm_gateway.context import gateway_of
from sagellm_protocol.openai import ChatCompletionRequest
from sagellm_protocol.openai.render import to_body

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(http: HttpRequest) -> HttpResponse:
    """Answer a conversation."""
    call = await read_call(http, ChatCompletionRequest, what="chat completion request")
    refuse_unbuilt(call)
    answers = gateway_of(http).answers
    if call.stream:
        return await start_event_stream(http, stream_chat(answers, call))
    return JSONResponse(to_body(await while_connected(http, answer_chat(answers, call))))
