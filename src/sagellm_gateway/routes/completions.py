"""`/v1/completions`."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse

from sagellm_core.answers import answer_completion, read_prompts, stream_completion
from sagellm_core.http import start_event_stream, while_connected
from sagellm_gateway.body import read_call
from sagellm_gateway.context import gateway_of
from sagellm_gateway.documents import EVENTS, GENERATION, described
from sagellm_protocol.openai import Completion, CompletionRequest

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", response_model=None)
@described(body=CompletionRequest, answer=Completion, also=EVENTS, fails=GENERATION)
async def completions(http: HttpRequest) -> HttpResponse:
    """Continue one or several prompts."""
    call = await read_call(http, CompletionRequest, what="completion request")
    answers = gateway_of(http).answers
    prompts = await read_prompts(call, partial(gateway_of(http).manager.detokenize, call.model))
    requests = call.to_requests()
    if call.stream:
        return await start_event_stream(http, stream_completion(answers, call, requests, prompts))
    body = await while_connected(http, answer_completion(answers, call, requests, prompts))
    return HttpResponse(body, media_type="application/json")
