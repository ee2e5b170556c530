"""Requests that want a vector: from the engine core's pooled rows to the response, and several at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from sagellm_core.output_metrics import OutputTimer
from sagellm_core.pooled import to_vector
from sagellm_protocol import (
    EmbedParams,
    FinishReason,
    InternalError,
    Request,
    Response,
    SageLLMError,
    Usage,
    wall_clock_epoch,
)

if TYPE_CHECKING:
    from sagellm_core.engine_core.types import CoreClient, EngineCoreOutput, EngineCoreRequest
    from sagellm_core.models.pooling import PoolingSpec

__all__ = ["EMBEDDINGS_AT_ONCE", "Inputs", "embedding_requests", "execute_all", "execute_embedding"]

# Texts of one caller in front of the engines at a time: enough to fill a batch, not enough to fill the queue.
EMBEDDINGS_AT_ONCE = 64

Inputs = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]


async def execute_embedding(
    client: CoreClient,
    request: Request,
    core: EngineCoreRequest,
    spec: PoolingSpec,
    *,
    engine_id: str,
    peak_mem_mb: Callable[[], float],
) -> Response:
    """Run `core`, which was made of `request`, and put its vector into the response."""
    timer = OutputTimer(core, time.monotonic, wall_clock_epoch(), peak_mem_mb)
    last: EngineCoreOutput | None = None
    async with aclosing(client.submit(core)) as outputs:
        async for last in outputs:
            timer.record(last, 0)
    if last is None or last.finish_reason is None:
        raise InternalError(f"the engine ended request {core.request_id} without a finish reason")
    reason, error = last.finish_reason, last.error
    embedding = None
    if reason is FinishReason.STOP:
        try:
            embedding = _vector(last, core, request.embed or EmbedParams(), spec)
        except SageLLMError as failure:
            reason, error = FinishReason.ERROR, failure.to_error()
    return Response(
        request_id=request.request_id,
        trace_id=request.trace_id,
        finish_reason=reason,
        error=error,
        metrics=timer.metrics(0, last.num_cached_tokens, failed=error is not None),
        usage=Usage(prompt_tokens=len(core.prompt_token_ids), cached_tokens=last.num_cached_tokens),
        embedding=embedding,
        model=request.model,
        engine_id=engine_id,
    )


def embedding_requests(
    inputs: Inputs, *, dimensions: int | None = None, truncate_prompt_tokens: int | None = None, model: str = "default"
) -> list[Request]:
    """One request for each text, or list of token ids, of `inputs`; raises `InvalidArgumentError`."""
    embed = EmbedParams(dimensions=dimensions, truncate_prompt_tokens=truncate_prompt_tokens)
    prompts = [inputs] if isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], int)) else inputs
    return [
        Request(model=model, prompt=prompt if isinstance(prompt, str) else list(prompt), max_tokens=1, embed=embed)  # type: ignore[arg-type]
        for prompt in prompts
    ]


async def execute_all(
    execute: Callable[[Request], Awaitable[Response]], requests: Sequence[Request], *, at_once: int
) -> list[Response]:
    """The responses in order, `at_once` requests running at a time; the first error is raised and ends the others."""
    places = asyncio.Semaphore(at_once)

    async def run(request: Request) -> Response:
        async with places:
            return (await execute(request)).raise_for_error()

    tasks = [asyncio.ensure_future(run(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _vector(output: EngineCoreOutput, core: EngineCoreRequest, wanted: EmbedParams, spec: PoolingSpec) -> list[float]:
    assert output.pooled is not None, "a request with pooling ends with its pooled row"
    if not output.pooled.isfinite().all():
        raise InternalError("the model's hidden states are not all numbers; its weights may be damaged")
    return to_vector(spec, output.pooled, len(core.prompt_token_ids), wanted.dimensions)
