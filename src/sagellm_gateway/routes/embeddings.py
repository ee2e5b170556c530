"""`/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
import sys
from array import array

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse

from sagellm_core.http import while_connected
from sagellm_gateway.body import read_call
from sagellm_gateway.context import gateway_of
from sagellm_gateway.documents import GENERATION, described
from sagellm_gateway.embeddings import Embeddings, embed
from sagellm_protocol.openai import EmbeddingRequest, EmbeddingResponse

router = APIRouter(tags=["OpenAI"])

_encode = msgspec.json.Encoder().encode
# Numbers written as JSON before others get a turn: a millisecond.
_NUMBERS_AT_ONCE = 10_000


@router.post("/v1/embeddings", response_model=None)
@described(body=EmbeddingRequest, answer=EmbeddingResponse, fails=GENERATION)
async def embeddings(http: HttpRequest) -> HttpResponse:
    """Make a vector of each text."""
    call = await read_call(http, EmbeddingRequest, what="embedding request")
    work = embed(
        gateway_of(http),
        call.input,
        model=call.model,
        dimensions=call.dimensions,
        truncate_prompt_tokens=call.truncate_prompt_tokens,
    )
    made = await while_connected(http, work)
    body = await _body(made, call.model, as_base64=call.encoding_format == "base64")
    return HttpResponse(body, media_type="application/json")


async def _body(made: Embeddings, model: str, *, as_base64: bool) -> bytes:
    """The answer as OpenAI writes it; a large one is written piece by piece, so that others get a turn."""
    items, num_numbers = [], 0
    for index, vector in enumerate(made.vectors):
        embedding = to_base64(vector) if as_base64 else vector
        items.append(_encode({"object": "embedding", "index": index, "embedding": embedding}))
        num_numbers += len(vector)
        if num_numbers > _NUMBERS_AT_ONCE:
            num_numbers = 0
            await asyncio.sleep(0)
    tokens = made.usage.prompt_tokens
    rest = _encode({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return b'{"object":"list","data":[%b],%b' % (b",".join(items), rest[1:])


def to_base64(vector: list[float]) -> str:
    """The text of the vector's little-endian float32 bytes."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
