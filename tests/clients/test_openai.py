"""OpenAI's own client works unchanged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Literal

import pytest
from pydantic import BaseModel

openai = pytest.importorskip("openai", reason="the openai client is not installed")

MODEL = "builtin"
QUESTION = [{"role": "user", "content": "What is a token?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


class Mood(BaseModel):
    """A schema with nesting, an enum and bounds."""

    class Part(BaseModel):
        name: Literal["joy", "fear"]
        share: int

    parts: list[Part]
    is_good: bool


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="any", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).owned_by == "sagellm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_chat_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_completion_tokens=60)
    assert "piece of text" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "chat.completion"


def test_a_stream_tells_the_same(client: openai.OpenAI) -> None:
    arguments = {"model": MODEL, "messages": QUESTION, "max_tokens": 40}
    whole = client.chat.completions.create(**arguments)
    stream = client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    with client.chat.completions.stream(**arguments) as events:
        events.until_done()
        assert events.get_final_completion().choices[0].message.content == text


def test_many_requests_at_once(base_url: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="any") as client:
            calls = (
                client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=24, temperature=0.9, seed=7)
                for _ in range(12)
            )
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    assert len(set(asyncio.run(ask()))) == 1, "a seed gives the same answer in any company"


def test_parameters_of_decoding(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        n=2,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={"5": -5},
        seed=3,
        stop=["\n\n"],
        max_tokens=12,
        logprobs=True,
        top_logprobs=2,
        user="somebody",
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.05},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        entries = choice.logprobs.content
        assert "".join(entry.token for entry in entries).startswith(choice.message.content[:5])
        assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["Once upon a time", "A KV cache"], max_tokens=8, echo=True, logprobs=1
    )
    assert answer.choices[0].text.startswith("Once upon a time")
    assert answer.choices[1].text.startswith("A KV cache")
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs)
    stream = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, stream=True)
    assert "Once upon a time" + "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert unknown.value.body["param"] == "model"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model=MODEL, messages=[])


def test_structured_outputs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Mood, max_tokens=80)
    assert isinstance(answer.choices[0].message.parsed, Mood)
    loose = client.chat.completions.create(
        model=MODEL, messages=QUESTION, response_format={"type": "json_object"}, max_tokens=40, temperature=1, seed=1
    )
    assert isinstance(json.loads(loose.choices[0].message.content), dict)
    choice = client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body={"guided_choice": ["yes", "no"]})
    assert choice.choices[0].message.content in ("yes", "no")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_must_be_called(client: openai.OpenAI, choice: object, stream: bool) -> None:
    arguments = {"model": MODEL, "messages": QUESTION, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 100}
    if stream:
        with client.chat.completions.stream(**arguments) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**arguments).choices[0].message
    assert message.tool_calls[0].function.name == "get_weather"
    given = json.loads(message.tool_calls[0].function.arguments)
    assert isinstance(given["city"], str)
    assert given["unit"] in ("celsius", "fahrenheit")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    again = client.chat.completions.create(
        model=MODEL, messages=[*QUESTION, message, result], tools=[WEATHER], tool_choice="none", max_tokens=8
    )
    assert again.choices[0].message.tool_calls is None


def test_tools_that_the_model_would_never_see_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.OpenAIError, match="chat template has no place for them"):
        client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[WEATHER])
