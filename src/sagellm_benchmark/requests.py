"""Batches of random prompts through an `LLMEngine`, and when their tokens arrived."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

from sagellm_benchmark.timing import TokenTimes
from sagellm_protocol import SamplingParams, StreamEventDelta, StreamEventEnd

if TYPE_CHECKING:
    from sagellm_core import LLMEngine


def random_prompts(num_requests: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids drawn evenly from the vocabulary: no two prompts share a prefix that a cache could use."""
    generator = random.Random(seed)
    return [generator.choices(range(vocab_size), k=length) for _ in range(num_requests)]


async def stream_batch(
    engine: LLMEngine, prompts: list[list[int]], output_len: int, *, concurrency: int | None = None
) -> TokenTimes:
    """Answer all prompts greedily with exactly `output_len` tokens each, at most `concurrency` at a time.

    Raises the error of a request that fails: a benchmark of failures would measure nothing.
    """
    sampling = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    places = asyncio.Semaphore(concurrency or len(prompts))
    began = time.perf_counter()

    async def answer(prompt: list[int]) -> list[float]:
        arrivals: list[float] = []
        async with places:
            async for event in engine.stream(prompt, sampling_params=sampling):
                if isinstance(event, StreamEventDelta):
                    arrivals += [time.perf_counter() - began] * len(event.chunk_tokens)
                elif isinstance(event, StreamEventEnd) and event.error is not None:
                    raise event.error.to_exception()
        return arrivals

    tasks = [asyncio.ensure_future(answer(prompt)) for prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
