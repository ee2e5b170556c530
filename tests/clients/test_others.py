"""Further clients that speak OpenAI's API: LiteLLM, instructor, lm-eval."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import BaseModel, Field

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is a token?"}]


class Book(BaseModel):
    title: str = Field(max_length=30)
    pages: int = Field(ge=1, le=999)


def test_litellm(base_url: str) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    arguments = {"model": "openai/builtin", "api_base": base_url, "api_key": "any", "messages": QUESTION}
    answer = litellm.completion(**arguments, max_tokens=40)
    assert "piece of text" in answer.choices[0].message.content
    chunks = litellm.completion(**arguments, max_tokens=40, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    later = asyncio.run(litellm.acompletion(**arguments, max_tokens=40))
    assert later.choices[0].message.content == text


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(base_url: str, mode: str) -> None:
    instructor = pytest.importorskip("instructor", reason="instructor is not installed")
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="any"), mode=instructor.Mode[mode])
    book = client.chat.completions.create(
        model="builtin", messages=QUESTION, response_model=Book, max_tokens=120, max_retries=0
    )
    assert isinstance(book, Book)


def test_lm_eval(base_url: str, tmp_path: object) -> None:
    """`local-completions` on a tiny task: log-likelihoods of choices, from echoed prompts of token ids."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{base_url}/completions", model="builtin", tokenizer_backend="remote", max_length=512
    )
    pairs = [("A token is", " a piece of text"), ("A token is", " zebra zebra zebra")]
    requests = [
        Instance("loglikelihood", {}, pair, number, metadata=("tiny", number, 1)) for number, pair in enumerate(pairs)
    ]
    (likely, _), (unlikely, _) = model.loglikelihood(requests, disable_tqdm=True)
    assert likely > unlikely
