"""Vectors of texts, for whatever API asked: each text is a request of its own, several run at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sagellm_core.embedding import EMBEDDINGS_AT_ONCE, Inputs, embedding_requests, execute_all
from sagellm_gateway.errors import naming
from sagellm_gateway.streams import cut_off
from sagellm_protocol import Request, Response, Usage

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The vectors in the order of the texts, and what all of them took."""

    vectors: list[list[float]]
    usage: Usage


async def embed(
    gateway: Gateway,
    inputs: Inputs,
    *,
    model: str,
    dimensions: int | None = None,
    truncate_prompt_tokens: int | None = None,
    field: str = "input",
) -> Embeddings:
    """The vectors of `inputs`, which stand in the field `field` of the call; the first error is raised."""
    requests = embedding_requests(
        inputs, model=model, dimensions=dimensions, truncate_prompt_tokens=truncate_prompt_tokens
    )
    has_several = len(requests) > 1
    places = {request.request_id: f"{field}[{i}]" if has_several else field for i, request in enumerate(requests)}

    async def execute(request: Request) -> Response:
        with naming({"prompt": places[request.request_id]}):
            return await gateway.answers.execute(request)

    responses = await execute_all(execute, requests, at_once=EMBEDDINGS_AT_ONCE)
    return Embeddings([_vector(response) for response in responses], _sum(responses))


def _vector(response: Response) -> list[float]:
    if response.embedding is None:
        raise cut_off()
    return response.embedding


def _sum(responses: list[Response]) -> Usage:
    return Usage(
        prompt_tokens=sum(response.usage.prompt_tokens for response in responses),
        cached_tokens=sum(response.usage.cached_tokens for response in responses),
    )
