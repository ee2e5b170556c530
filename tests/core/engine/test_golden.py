"""The real trained models: greedy ids, logprobs and perplexity as recorded in `../shared/golden`."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_protocol import SamplingParams

MODELS = ("stories260K", "llama2xs")


def engine_for(shared: Path, name: str, **options: Any) -> LLMEngine:
    return LLMEngine(LLMEngineConfig(model_path=str(shared / "models" / name), backend_type="cpu", **options))


@pytest.mark.parametrize("name", MODELS)
async def test_greedy_ids_and_logprobs_equal_the_recorded_ones(shared: Path, name: str) -> None:
    golden = json.loads((shared / "golden" / f"{name}.json").read_text())
    sampling = SamplingParams(max_tokens=64, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    async with engine_for(shared, name) as engine:
        cases = golden["cases"]
        responses = await asyncio.gather(*(engine.generate(c["prompt"], sampling_params=sampling) for c in cases))
    assert len(cases) == 5
    for case, response in zip(cases, responses, strict=True):
        assert response.output_tokens == case["new_ids"]
        assert response.output_text == case["text"]
        assert response.logprobs is not None
        chosen = [entry.logprob for entry in response.logprobs]
        assert chosen == pytest.approx(case["logprob_of_chosen"], abs=2e-4)
        assert response.prompt_logprobs is not None
        prompt = [entry.logprob for entry in response.prompt_logprobs if entry is not None]
        assert prompt == pytest.approx(case["prompt_logprobs"], abs=2e-4)


@pytest.mark.parametrize("name", MODELS)
async def test_perplexity_equals_the_recorded_one(shared: Path, name: str) -> None:
    recorded = json.loads((shared / "golden" / f"{name}.json").read_text())["perplexity"]
    texts = json.loads((shared / recorded["text"]).read_text())
    sampling = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    limit = recorded["truncated_to"] - 1  # the engine keeps a place for the answer, so each text loses a token
    async with engine_for(shared, name, max_model_len=limit + 1) as engine:
        prompts = [engine.tokenizer.encode(text)[:limit] for text in texts]
        responses = await asyncio.gather(*(engine.generate(p, sampling_params=sampling) for p in prompts))
    logprobs = [
        entry.logprob for response in responses for entry in response.prompt_logprobs or () if entry is not None
    ]
    assert len(logprobs) == pytest.approx(recorded["tokens"], abs=len(texts))
    loss = -math.fsum(logprobs) / len(logprobs)
    assert loss == pytest.approx(recorded["loss_nats_per_token"], abs=5e-3)
