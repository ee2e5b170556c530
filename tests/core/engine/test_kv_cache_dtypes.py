"""The engine answers from KV caches of every dtype, through the kernels and through the reference ops."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_core.config import KVCacheDType
from sagellm_protocol import SamplingParams
from tiny_engine import make_engine

DTYPES: list[KVCacheDType] = ["fp32", "bf16", "fp16", "int8"]
QUESTION = {"role": "user", "content": "What is a token?"}


@pytest.mark.parametrize("dtype", DTYPES)
async def test_the_built_in_model_answers(dtype: KVCacheDType) -> None:
    config = LLMEngineConfig(model_path="builtin", backend_type="cpu", num_kv_blocks=256, kv_cache_dtype=dtype)
    async with LLMEngine(config) as engine:
        response = await engine.generate(messages=[QUESTION])
    assert "piece of text" in response.output_text


@pytest.mark.parametrize(("dtype", "entry_bytes"), [("fp32", 24 * 4), ("fp16", 24 * 2), ("int8", 24 + 4)])
async def test_company_changes_nothing_where_no_kernel_takes_the_heads(
    folder: Path, dtype: KVCacheDType, entry_bytes: int
) -> None:
    prompts = [list(range(start, start + 9 + start)) for start in (3, 11, 20)]
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    async with make_engine(folder, kv_cache_dtype=dtype) as engine:
        alone = [(await engine.generate(prompt, sampling_params=sampling)).output_tokens for prompt in prompts]
        await engine.reset_prefix_cache()
        together = await asyncio.gather(*(engine.generate(prompt, sampling_params=sampling) for prompt in prompts))
        bytes_per_token = engine.get_info()["kv_bytes_per_token"]
    assert [response.output_tokens for response in together] == alone
    assert bytes_per_token == 3 * 2 * 2 * entry_bytes  # layers, K and V, KV heads
