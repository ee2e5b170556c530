"""Cached prefixes are shared where they may be, and never change an answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sagellm_protocol import Request, SamplingParams
from tiny_engine import BLOCK_SIZE, make_engine

PROMPT = list(range(10, 45))  # 35 tokens: four full blocks
NUM_CACHED = len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE
SAMPLING = SamplingParams(max_tokens=10, ignore_eos=True)


def request(salt: str | None = None, **fields: object) -> Request:
    return Request.model_validate({"prompt": PROMPT, "sampling_params": SAMPLING, "cache_salt": salt, **fields})


async def test_only_requests_with_the_same_salt_share(folder: Path) -> None:
    async with make_engine(folder) as engine:
        salts = (None, "red", "blue", "red", None, "blue")
        responses = [await engine.execute(request(salt)) for salt in salts]
    assert [response.usage.cached_tokens for response in responses] == [0, 0, 0, *[NUM_CACHED] * 3]
    assert len({tuple(response.output_tokens) for response in responses}) == 1


async def test_without_the_cache_nothing_hits(folder: Path) -> None:
    async with make_engine(folder, enable_prefix_caching=False) as engine:
        responses = [await engine.execute(request()) for _ in range(3)]
        stats = await engine.stats()
    async with make_engine(folder) as engine:
        cached = [await engine.execute(request()) for _ in range(2)][-1]
    assert stats.prefix_hit_tokens == 0
    assert [response.metrics.prefix_hit_rate for response in responses] == [0, 0, 0]
    assert {tuple(response.output_tokens) for response in responses} == {tuple(cached.output_tokens)}


async def test_the_outputs_of_one_request_share_its_prompt(folder: Path) -> None:
    sampling = SamplingParams(max_tokens=10, ignore_eos=True, temperature=1.0, seed=3, n=4)
    # One prompt a step, so that the first output's blocks are known when the others are admitted.
    async with make_engine(folder, max_num_batched_tokens=len(PROMPT)) as engine:
        shared = await engine.generate(PROMPT, sampling_params=sampling)
        stats = await engine.stats()
    async with make_engine(folder, enable_prefix_caching=False) as engine:
        alone = await engine.generate(PROMPT, sampling_params=sampling)
    assert stats.prefix_hit_tokens == 3 * NUM_CACHED
    assert [output.token_ids for output in shared.outputs] == [output.token_ids for output in alone.outputs]
    assert len({tuple(output.token_ids) for output in shared.outputs}) == 4


async def test_a_conversation_hits_its_own_answer(folder: Path) -> None:
    async with make_engine(folder) as engine:
        first = await engine.execute(request())
        history = [*PROMPT, *first.output_tokens, 7, 8, 9]
        second = await engine.generate(history, sampling_params=SAMPLING)
        reset = await engine.reset_prefix_cache()
        again = await engine.generate(history, sampling_params=SAMPLING)
    # The first answer's last token was never computed.
    assert second.usage.cached_tokens == (len(PROMPT) + 9) // BLOCK_SIZE * BLOCK_SIZE
    assert reset
    assert again.usage.cached_tokens == 0
    assert again.output_tokens == second.output_tokens


async def test_a_wholly_cached_prompt_still_computes_its_last_token(folder: Path) -> None:
    prompt = PROMPT[: 4 * BLOCK_SIZE]
    async with make_engine(folder) as engine:
        first, second = [await engine.generate(prompt, sampling_params=SAMPLING) for _ in range(2)]
    assert second.usage.cached_tokens == 3 * BLOCK_SIZE
    assert second.output_tokens == first.output_tokens


@pytest.mark.parametrize("policy", ["lru", "lfu"])
async def test_answers_survive_an_overflowing_cache(folder: Path, policy: str) -> None:
    prompts = [[start] * 16 + PROMPT[:10] for start in range(50, 58)]
    async with make_engine(folder, enable_prefix_caching=False) as engine:
        expected = [(await engine.generate(prompt, sampling_params=SAMPLING)).output_tokens for prompt in prompts]
    async with make_engine(folder, max_model_len=48, num_kv_blocks=12, eviction_policy=policy) as engine:
        for _ in range(2):
            runs = [engine.generate(prompt, sampling_params=SAMPLING) for prompt in prompts]
            assert [response.output_tokens for response in await asyncio.gather(*runs)] == expected
        assert (await engine.stats()).evict_count > 0
