"""`/v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse

from sagellm_core.answers import answer_completion, read_prompts, stream_completion
from sagellm_core.http import start_event_stream, while_connected
from sagellm_gateway.body import read_call
from sagellm_gateway.context import gateway_of
from sagellm_protocol.openai import CompletionRequest
from sagellm_protocol.openai.render import to_body

router = APIRouter()


@router.post("/v1/completions", response_model=None)
async def completions(http: HttpRequest) -> HttpResponse:
    """Continue one or several prompts."""
    call = await read_call(http, CompletionRequest, what="completion request")
    answers = gateway_of(http).answers
    prompts = read_prompts(call)
    if call.stream:
        return await start_event_stream(http, stream_completion(answers, call, prompts))
    return JSONResponse(to_body(await while_connected(http, answer_completion(answers, call, prompts))))
