"""Structured output through the whole engine, with the built-in model: forms, streams, batches, caches, ends."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import pytest_asyncio

from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_core.engine_core.types import EngineCoreRequest
from sagellm_protocol import (
    ErrorCode,
    FinishReason,
    InvalidArgumentError,
    Request,
    Response,
    SamplingParams,
    StreamEventDelta,
    StreamEventEnd,
    StructuredOutput,
)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["tall", "kind", "quick"]}, "minItems": 1},
        "friend": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "friend"],
    "additionalProperties": False,
}
pytestmark = pytest.mark.asyncio(loop_scope="module")  # one engine for all

QUESTION = [{"role": "user", "content": "Tell me about Bob, his friends, and what an inference engine does."}]


def engine_with(**fields: Any) -> LLMEngine:
    small = {"max_model_len": 512, "num_kv_blocks": 256, "block_size": 16, "max_batch_size": 16}
    return LLMEngine(LLMEngineConfig.model_validate({"model_path": "builtin", "backend_type": "cpu"} | small | fields))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[LLMEngine]:
    async with engine_with() as engine:
        yield engine


def ask(form: dict[str, Any], max_tokens: int = 64, **fields: Any) -> Request:
    sampling = fields.pop("sampling", {"temperature": 1.0, "seed": 7})
    return Request.model_validate(
        {
            "messages": QUESTION,
            "structured_output": form,
            "sampling_params": {"max_tokens": max_tokens, **sampling},
            **fields,
        }
    )


def tokens_of(response: Response) -> list[list[int]]:
    return [output.token_ids for output in response.outputs]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
async def test_every_form(engine: LLMEngine, temperature: float) -> None:
    sampling = {"temperature": temperature, "seed": 3}
    forms = [
        {"json_schema": PERSON},
        {"json_object": True},
        {"regex": "[A-Z][a-z]+ is [0-9]{2}"},
        {"choice": ["yes", "no", "I do not know."]},
        {"grammar": 'start: "<" WORD ">" body "</>"\nWORD: /[a-z]+/\nbody: /[^<]*/'},
    ]
    answers = await asyncio.gather(*(engine.execute(ask(form, 48, sampling=sampling)) for form in forms))
    person, document, sentence, choice, tag = (answer.output_text for answer in answers)
    jsonschema.validate(json.loads(person), PERSON)
    assert isinstance(json.loads(document), dict)
    assert re.fullmatch("[A-Z][a-z]+ is [0-9]{2}", sentence)
    assert choice in forms[3]["choice"]
    assert re.fullmatch("<[a-z]+>[^<]*</>", tag)
    assert {answer.finish_reason for answer in answers} == {FinishReason.STOP}
    assert all(len(answer.output_tokens) <= 48 and answer.error is None for answer in answers)


async def shortest(engine: LLMEngine, form: dict[str, Any]) -> int:
    """The tokens of the shortest answer of this form that is known."""
    (core,) = await engine._running().prepare(ask(form))
    completion = core.grammar.completion  # type: ignore[union-attr]
    assert completion is not None
    return int(completion.num_tokens)


@pytest.mark.parametrize("extra", [0, 1, 2, 5, 12, 30])
async def test_answers_are_complete_within_any_tokens(engine: LLMEngine, extra: int) -> None:
    max_tokens = await shortest(engine, {"json_schema": PERSON}) + extra
    for seed in range(4):
        answer = await engine.execute(
            ask({"json_schema": PERSON}, max_tokens, sampling={"temperature": 1.5, "seed": seed})
        )
        assert len(answer.output_tokens) <= max_tokens
        assert answer.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(answer.output_text), PERSON)


async def test_too_few_tokens_end_by_length(engine: LLMEngine) -> None:
    answer = await engine.execute(ask({"json_schema": PERSON}, 6))
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.output_text.startswith('{"name":')


async def test_several_outputs_and_a_stream(engine: LLMEngine) -> None:
    request = ask({"json_schema": PERSON}, 40, sampling={"temperature": 1.5, "seed": 1, "n": 2})
    whole = await engine.execute(request)
    texts = {0: "", 1: ""}
    async for event in engine.stream(request):
        if isinstance(event, StreamEventDelta):
            texts[event.index] += event.chunk
        if isinstance(event, StreamEventEnd):
            assert event.finish_reason is FinishReason.STOP
    assert [output.text for output in whole.outputs] == [texts[0], texts[1]]
    assert texts[0] != texts[1]
    for text in texts.values():
        jsonschema.validate(json.loads(text), PERSON)


CUTS: dict[str, dict[str, Any]] = {
    "chunks": {"prefill_chunk_size": 4},
    "no prefix cache": {"enable_prefix_caching": False},
    "preemption": {"num_kv_blocks": 8, "max_model_len": 128},
}


@pytest.mark.parametrize("cut", CUTS)
async def test_tokens_are_the_same_alone_and_in_any_company(engine: LLMEngine, cut: str) -> None:
    requests = [
        ask({"json_schema": PERSON}, 40 + i, sampling={"temperature": 1.2 * (i % 2), "seed": i}) for i in range(4)
    ]
    requests.append(Request(messages=QUESTION, max_tokens=40))  # greedy, without a form
    alone = [tokens_of(await engine.execute(request)) for request in requests]
    again = [tokens_of(await engine.execute(request)) for request in requests]  # from the prefix cache
    async with engine_with(**CUTS[cut]) as other:
        together = [tokens_of(answer) for answer in await asyncio.gather(*map(other.execute, requests))]
        preemptions = (await other.stats()).num_preemptions
    assert alone == again == together
    assert (preemptions > 0) == (cut == "preemption")
    assert (await engine.stats()).prefix_hit_tokens > 0


async def test_resubmitted_with_what_was_emitted_it_goes_on_the_same(engine: LLMEngine) -> None:
    """What a failover does: prompt + emitted tokens, the rest of the tokens, the same seed."""
    request = ask({"json_schema": PERSON}, 36, sampling={"temperature": 1.5, "seed": 5})
    (core,) = await engine._running().prepare(request)
    client = engine._running_client()

    async def run(request: EngineCoreRequest) -> list[int]:
        return [token_id async for output in client.submit(request) for token_id in output.new_token_ids]

    whole = await run(core)
    for cut in (1, 9, len(whole) - 1):
        rest = replace(
            core,
            request_id=f"rest-{cut}",
            prompt_token_ids=[*core.prompt_token_ids, *whole[:cut]],
            sampled_prefix_len=cut,
            sampling=core.sampling.replace(max_tokens=36 - cut),
        )
        assert await run(rest) == whole[cut:]


async def test_logprobs_are_those_of_the_tokens_returned(engine: LLMEngine) -> None:
    """Of replaced tokens, too: as prompt tokens they have the same log-probabilities."""
    sampling = {"temperature": 2.0, "seed": 2, "logprobs": 2}
    max_tokens = await shortest(engine, {"json_schema": PERSON}) + 1
    request = ask({"json_schema": PERSON}, max_tokens, sampling=sampling)
    answer = await engine.execute(request)
    (output,) = answer.outputs
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    (core,) = await engine._running().prepare(request)
    scored = await engine.generate(
        [*core.prompt_token_ids, *output.token_ids],
        sampling_params=SamplingParams(max_tokens=1, prompt_logprobs=0),
    )
    assert scored.prompt_logprobs is not None
    expected = [entry.logprob for entry in scored.prompt_logprobs[len(core.prompt_token_ids) :] if entry is not None]
    assert [entry.logprob for entry in output.logprobs] == pytest.approx(expected, abs=2e-3)
    plain = ask({"json_schema": PERSON}, max_tokens, sampling={**sampling, "logprobs": None})
    assert tokens_of(await engine.execute(plain)) == [output.token_ids]


@pytest.mark.parametrize(
    "sampling",
    [
        {"ignore_eos": True},
        {"min_tokens": 60},
        {"stop_token_ids": [2, 3]},
        {"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 1.0},
        {"logit_bias": {2: 100.0}},
        {"top_k": 1},
        {"top_p": 0.1},
        {"min_p": 0.5},
    ],
)
async def test_the_form_wins_over_other_parameters(engine: LLMEngine, sampling: dict[str, Any]) -> None:
    answer = await engine.execute(
        ask({"json_schema": PERSON}, 60, sampling={"temperature": 1.0, "seed": 4, **sampling})
    )
    assert answer.finish_reason is FinishReason.STOP
    jsonschema.validate(json.loads(answer.output_text), PERSON)


async def test_an_open_end_waits_for_min_tokens_and_goes_on_under_ignore_eos(engine: LLMEngine) -> None:
    form = {"regex": "(ha)*"}
    for sampling in ({"min_tokens": 10}, {"ignore_eos": True}):
        answer = await engine.execute(ask(form, 12, sampling={**sampling, "logit_bias": {2: 100.0}}))
        assert len(answer.output_tokens) >= 10
        assert answer.finish_reason is FinishReason.STOP
        assert re.fullmatch("(ha)+", answer.output_text)
    answer = await engine.execute(ask(form, 12, sampling={"logit_bias": {2: 100.0}}))
    assert (answer.output_text, answer.finish_reason) == ("", FinishReason.STOP)


async def test_stop_strings_still_end_the_text(engine: LLMEngine) -> None:
    answer = await engine.execute(ask({"json_schema": PERSON}, 60, sampling={"stop": ["age"]}))
    assert answer.finish_reason is FinishReason.STOP
    assert "age" not in answer.output_text


async def test_what_cannot_be_compiled_disturbs_nobody(engine: LLMEngine) -> None:
    good = asyncio.ensure_future(engine.execute(ask({"json_schema": PERSON})))
    with pytest.raises(InvalidArgumentError, match="cannot be compiled") as error:
        await engine.execute(ask({"regex": "a(b"}))
    assert error.value.context["field"] == "structured_output"
    with pytest.raises(InvalidArgumentError, match="use greedy or sampling"):
        await engine.execute(ask({"regex": "a"}, sampling={"num_beams": 2}))
    assert (await good).finish_reason is FinishReason.STOP


async def test_a_grammar_that_grows_too_complex_ends_alone(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from sagellm_core.structured import steering

    class Fails(steering.SteeredMatcher):
        def accept(self, token_id: int, tokens_left: int) -> int:
            raise steering.cannot_compile("too many states")

    good = engine.execute(ask({"json_schema": PERSON}))
    (core,) = await engine._running().prepare(ask({"choice": ["yes", "no"]}))
    assert core.grammar is not None
    monkeypatch.setattr(type(core.grammar), "start", _start_as(Fails, core.grammar, type(core.grammar).start))
    answer, other = await asyncio.gather(engine.execute(ask({"choice": ["yes", "no"]})), good)
    assert answer.finish_reason is FinishReason.ERROR
    assert answer.error is not None
    assert answer.error.code is ErrorCode.INVALID_ARGUMENT
    assert other.finish_reason is FinishReason.STOP


def _start_as(kind: type, grammar: Any, start: Any) -> Any:
    """`Grammar.start`, which for this grammar gives matchers of another kind."""

    def start_as(self: Any, max_tokens: int, emitted: Any = ()) -> Any:
        matcher = start(self, max_tokens, emitted)
        if self is grammar:
            matcher.__class__ = kind
        return matcher

    return start_as


async def test_the_short_form(engine: LLMEngine) -> None:
    form = StructuredOutput(choice=["yes", "no"])
    answer = await engine.generate("Is it so?", structured_output=form, max_tokens=8)
    assert answer.output_text in ("yes", "no")
    events = [event async for event in engine.stream("Is it so?", structured_output=form, max_tokens=8)]
    assert isinstance(events[-1], StreamEventEnd)
    assert events[-1].output_text == answer.output_text


async def test_nothing_is_loaded_without_a_form() -> None:
    async with engine_with() as engine:
        await engine.generate("Hello", max_tokens=2)
        assert engine._running()._grammars is None
