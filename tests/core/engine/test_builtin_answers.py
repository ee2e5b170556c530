"""The built-in model answers through the engine what a newcomer asks first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from sagellm_core import LLMEngine, LLMEngineConfig

# Words that a right answer holds, in lower case.
QUESTIONS = {
    "What is LLM inference?": ["trained", "language model", "token"],
    "what is the kv cache": ["keys and values"],
    "How do I install sageLLM?": ["pip install isagellm"],
    "How can I use another model?": ["--model"],
    "What is prefill versus decode?": ["prefill", "decode"],
    "Who are you?": ["built-in model of sagellm"],
    "Are you ChatGPT?": ["no,"],
    "Hello!": ["hello"],
    "Who was Napoleon?": ["do not know"],
    "Explain continuous batching": ["batch"],
    "What is a token?": ["piece of text"],
    "你是谁？": ["内置模型"],
    "什么是大模型推理？": ["大语言模型"],
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine() -> AsyncIterator[LLMEngine]:
    async with LLMEngine(LLMEngineConfig(model_path="builtin", backend_type="cpu", num_kv_blocks=1024)) as engine:
        yield engine


@pytest.mark.asyncio(loop_scope="module")
async def test_first_questions_are_answered_in_whole_sentences(engine: LLMEngine) -> None:
    asked = [engine.generate(messages=[{"role": "user", "content": question}]) for question in QUESTIONS]
    for (question, words), response in zip(QUESTIONS.items(), await asyncio.gather(*asked), strict=True):
        answer = response.output_text
        assert all(word in answer.lower() for word in words), (question, answer)
        assert answer.rstrip()[-1] in ".!?。！？`", (question, answer)
        assert response.finish_reason.value == "stop", (question, answer)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_story_goes_on_in_whole_words(engine: LLMEngine) -> None:
    prompt = "Once upon a time, there was a little girl named Lily."
    response = await engine.generate(prompt, max_tokens=80)
    words = response.output_text.split()
    assert len(words) > 30
    assert len(set(words)) > 20
    assert "." in response.output_text
