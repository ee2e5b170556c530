"""Greedy tokens of every family equal those of `transformers`, whatever the engine does to the batch."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from model_zoo import FAMILIES, build
from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_core.engine_core.report import EngineStats
from sagellm_protocol import SamplingParams
from small_tokenizers import byte_level_backend

NUM_TOKENS = 64
PROMPT_LENGTHS = (1, 2, 5, 9, 16, 23, 33, 48)

# Each changes how the work is cut up, none may change a token.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no prefix cache": {"enable_prefix_caching": False},
    "chunks of 16": {"prefill_chunk_size": 16},
    "chunks of 64": {"prefill_chunk_size": 64, "block_size": 8},
    "chunks off": {"enable_chunked_prefill": False, "block_size": 32},
    "preemption": {"num_kv_blocks": 14, "enable_prefix_caching": False},
}


def make_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    prompts[6][:16] = prompts[7][:16]  # something to share
    return prompts


def expected_tokens(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What `transformers` says to each prompt alone, never stopping early."""
    answers = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


async def run_together(
    folder: Path, prompts: list[list[int]], options: dict[str, Any]
) -> tuple[list[list[int]], EngineStats]:
    config = LLMEngineConfig(model_path=str(folder), max_model_len=128, **options)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS)
    async with LLMEngine(config) as engine:
        tasks = [engine.generate(prompt, sampling_params=sampling) for prompt in prompts]
        responses = await asyncio.gather(*tasks)
        again = await engine.generate(prompts[7], sampling_params=sampling)  # now with its prefix cached
        assert again.output_tokens == responses[7].output_tokens
        stats = await engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    return [response.output_tokens for response in responses], stats


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    model = build(request.param, folder)
    byte_level_backend(vocab_size=300).save(str(folder / "tokenizer.json"))
    prompts = make_prompts(model.config.get_text_config().vocab_size)
    return folder, prompts, expected_tokens(model, prompts)


@pytest.mark.parametrize("name", CONFIGURATIONS)
async def test_greedy_tokens_equal_transformers(checkpoint: Any, name: str) -> None:
    folder, prompts, expected = checkpoint
    tokens, stats = await run_together(folder, prompts, CONFIGURATIONS[name])
    assert tokens == expected
    assert name != "preemption" or stats.num_preemptions > 0
