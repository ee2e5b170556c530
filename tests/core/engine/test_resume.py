"""A request that is cut anywhere and goes on elsewhere: its events and its answer are those of the undisturbed run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_protocol import (
    ErrorCode,
    FinishReason,
    InvalidArgumentError,
    Request,
    ResumePoint,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
)
from tiny_engine import Brake, make_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")  # the engines serve all tests


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(llama: tuple[Path, Any]) -> AsyncIterator[tuple[LLMEngine, LLMEngine]]:
    """One that begins, and one that goes on and cuts up its work in another way."""
    folder = llama[0]
    async with make_engine(folder) as first, make_engine(folder, prefill_chunk_size=5, num_kv_blocks=40) as second:
        yield first, second


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def builtin() -> AsyncIterator[LLMEngine]:
    config = LLMEngineConfig(model_path="builtin", backend_type="cpu", max_model_len=512, num_kv_blocks=256)
    async with LLMEngine(config) as engine:
        yield engine


@dataclass
class Run:
    """What a stream brought."""

    deltas: list[StreamEventDelta] = field(default_factory=list)
    end: StreamEventEnd | None = None

    def of(self, index: int) -> list[StreamEventDelta]:
        return [delta for delta in self.deltas if delta.index == index]

    def tokens(self, index: int) -> list[int]:
        return [token_id for delta in self.of(index) for token_id in delta.chunk_tokens]


async def run(engine: LLMEngine, request: Request) -> Run:
    async with aclosing(engine.stream(request)) as events:
        seen = [event async for event in events]
    assert isinstance(seen[0], StreamEventStart)
    assert isinstance(seen[-1], StreamEventEnd)
    deltas = [event for event in seen if isinstance(event, StreamEventDelta)]
    assert len(deltas) == len(seen) - 2
    return Run(deltas, seen[-1])


def resumed(request: Request, before: Run, seed: int) -> Request:
    n = request.resolved_sampling().n
    point = ResumePoint(output_token_ids=[before.tokens(index) for index in range(n)], seed=seed)
    return request.model_copy(update={"resume_from": point})


def shape(delta: StreamEventDelta) -> tuple[Any, ...]:
    return delta.chunk, delta.chunk_tokens, delta.logprobs


def assert_goes_on(whole: Run, before: Run, after: Run, n: int) -> None:
    """`before` and `after` together are `whole`, delta by delta, and the end is the same but for its measurements."""
    assert whole.end is not None
    assert after.end is not None
    for index in range(n):
        assert [shape(d) for d in before.of(index) + after.of(index)] == [shape(d) for d in whole.of(index)]
        want, got = whole.end.outputs[index], after.end.outputs[index]
        assert (got.text, got.token_ids) == (want.text, want.token_ids)
        assert (got.finish_reason, got.stop_reason) == (want.finish_reason, want.stop_reason)
        if want.logprobs is not None:
            assert got.logprobs == want.logprobs[len(before.tokens(index)) :]
    assert after.end.usage.completion_tokens == whole.end.usage.completion_tokens
    assert after.end.usage.prompt_tokens == whole.end.usage.prompt_tokens
    assert after.end.error is None


async def check(first: LLMEngine, second: LLMEngine, request: Request, seed: int, cuts: list[int]) -> None:
    """Cut a run after each of these numbers of deltas (of the whole), one after the other."""
    n = request.resolved_sampling().n
    whole = await run(first, request)
    for cut in sorted(cut % (len(whole.deltas) + 1) for cut in cuts):
        before = Run(whole.deltas[:cut])
        assert_goes_on(whole, before, await run(second, resumed(request, before, seed)), n)


async def check_request(
    first: LLMEngine,
    second: LLMEngine,
    *,
    prompt: list[int],
    fields: dict[str, Any],
    seed: int,
    cuts: list[int],
    stops: list[tuple[int, int]],
) -> None:
    request = Request.model_validate({"prompt": prompt, "sampling_params": {"seed": seed, **fields}})
    if stops:  # of the text itself, so that they stop it
        text = (await first.execute(request)).output_text
        strings = [text[start % len(text) :][:size] for start, size in stops if text]
        request = Request.model_validate(
            {"prompt": prompt, "sampling_params": {"seed": seed, **fields, "stop": strings}}
        )
    await check(first, second, request, seed, cuts)


async def check_form(
    builtin: LLMEngine, *, form: dict[str, Any], max_tokens: int, temperature: float, seed: int, cuts: list[int]
) -> None:
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "n": 2}
    request = Request.model_validate({"prompt": "Tell me:", "structured_output": form, "sampling_params": sampling})
    await check(builtin, builtin, request, seed, cuts)


@st.composite
def sampling_fields(draw: st.DrawFn) -> dict[str, Any]:
    fields: dict[str, Any] = {"max_tokens": draw(st.integers(1, 24)), "n": draw(st.integers(1, 3))}
    fields["temperature"] = draw(st.sampled_from([0.0, 0.7, 1.5]))
    fields["ignore_eos"] = draw(st.booleans())
    fields["min_tokens"] = draw(st.integers(0, fields["max_tokens"]))
    optional: dict[str, st.SearchStrategy[Any]] = {
        "presence_penalty": st.just(1.5),
        "frequency_penalty": st.just(0.7),
        "repetition_penalty": st.just(1.4),
        "top_k": st.just(40),
        "logprobs": st.integers(0, 2),
        "stop_token_ids": st.lists(st.integers(3, 299), min_size=30, max_size=60),
        "include_stop_str_in_output": st.just(True),
        "skip_special_tokens": st.just(False),
        "logit_bias": st.just({2: 4.0}),  # the end of sequence comes often
    }
    for name in draw(st.sets(st.sampled_from(sorted(optional)))):
        fields[name] = draw(optional[name])
    return fields


def prompts() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(3, 299), min_size=1, max_size=30)


REQUESTS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": prompts(),
    "fields": sampling_fields(),
    "seed": st.integers(0, 2**62),
    "cuts": st.lists(st.integers(0, 80), min_size=1, max_size=3),
    "stops": st.lists(st.tuples(st.integers(0, 60), st.integers(1, 6)), max_size=3),
}
FORMS: dict[str, st.SearchStrategy[Any]] = {
    "form": st.sampled_from(
        [
            {"json_object": True},
            {"regex": "[A-Z][a-z]+ is [0-9]{2}"},
            {"choice": ["yes", "no", "I do not know."]},
            {"json_schema": {"type": "array", "items": {"enum": ["tall", "kind", "推理"]}, "minItems": 2}},
        ]
    ),
    "max_tokens": st.integers(3, 40),
    "temperature": st.sampled_from([0.0, 1.0, 3.0]),
    "seed": st.integers(0, 2**62),
    "cuts": st.lists(st.integers(0, 120), min_size=1, max_size=3),
}


def a_few(max_examples: int) -> settings:
    return settings(max_examples=max_examples, suppress_health_check=list(HealthCheck))


@a_few(15)
@given(case=st.fixed_dictionaries(REQUESTS))
async def test_any_cut_of_any_request(engines: tuple[LLMEngine, LLMEngine], case: dict[str, Any]) -> None:
    await check_request(*engines, **case)


@pytest.mark.slow
@a_few(200)
@given(case=st.fixed_dictionaries(REQUESTS))
async def test_many_cuts_of_many_requests(engines: tuple[LLMEngine, LLMEngine], case: dict[str, Any]) -> None:
    await check_request(*engines, **case)


@a_few(10)
@given(case=st.fixed_dictionaries(FORMS))
async def test_any_cut_under_a_grammar(builtin: LLMEngine, case: dict[str, Any]) -> None:
    await check_form(builtin, **case)


@pytest.mark.slow
@a_few(120)
@given(case=st.fixed_dictionaries(FORMS))
async def test_many_cuts_under_grammars(builtin: LLMEngine, case: dict[str, Any]) -> None:
    await check_form(builtin, **case)


@pytest.mark.parametrize("sampling", [{"num_beams": 3, "n": 2}, {"strategy": "contrastive"}])
async def test_searches_begin_again_and_say_only_what_is_new(
    engines: tuple[LLMEngine, LLMEngine], sampling: dict[str, Any]
) -> None:
    request = Request.model_validate(
        {"prompt": [5, 6, 7], "sampling_params": {"max_tokens": 8, "logprobs": 1, **sampling}}
    )
    await check(*engines, request, seed=1, cuts=[0, 1, 2, 5, 8])


async def test_it_goes_on_in_company(engines: tuple[LLMEngine, LLMEngine]) -> None:
    """While others run beside it, and preempt it."""
    first, second = engines
    requests = [
        Request.model_validate(
            {"prompt": [i, 7, 9] * 4, "sampling_params": {"max_tokens": 60, "temperature": 1.0, "seed": i}}
        )
        for i in range(3, 15)
    ]
    wholes = await asyncio.gather(*(run(first, request) for request in requests))
    beginnings = [Run(whole.deltas[: 5 * i % (len(whole.deltas) + 1)]) for i, whole in enumerate(wholes)]
    goes_on = [
        resumed(request, before, i) for i, (request, before) in enumerate(zip(requests, beginnings, strict=True), 3)
    ]
    preemptions = (await second.stats()).num_preemptions
    ends = await asyncio.gather(*(run(second, request) for request in goes_on))
    assert (await second.stats()).num_preemptions > preemptions
    for whole, before, after in zip(wholes, beginnings, ends, strict=True):
        assert_goes_on(whole, before, after, 1)


async def test_a_seed_alone_is_a_request_at_its_beginning(engines: tuple[LLMEngine, LLMEngine]) -> None:
    request = Request(prompt=[9, 8, 7], max_tokens=12, temperature=1.0)
    begun = request.model_copy(update={"resume_from": ResumePoint(seed=77)})
    whole = await run(engines[0], begun)
    before = Run(whole.deltas[:5])
    assert_goes_on(whole, before, await run(engines[1], resumed(request, before, 77)), 1)


async def test_what_had_ended_costs_no_step(engines: tuple[LLMEngine, LLMEngine]) -> None:
    request = Request(prompt=[9, 8, 7], max_tokens=6, sampling_params={"ignore_eos": True})
    whole = await run(engines[0], request)
    num_steps = (await engines[1].stats()).num_steps
    after = await run(engines[1], resumed(request, whole, 0))
    assert after.deltas == []
    assert (await engines[1].stats()).num_steps == num_steps


async def test_an_answer_given_up_holds_what_was_received(engines: tuple[LLMEngine, LLMEngine], brake: Brake) -> None:
    sampling = {"max_tokens": 60, "ignore_eos": True, "temperature": 1.0, "seed": 4}
    request = Request.model_validate({"prompt": [9, 8, 7], "sampling_params": sampling})
    whole = await run(engines[0], request)
    before = Run(whole.deltas[:9])
    brake.set(3)
    events = engines[1].stream(resumed(request, before, 4))
    await anext(events)
    engines[1].abort(request.request_id)
    brake.release()
    end = [event async for event in events][-1]
    assert isinstance(end, StreamEventEnd)
    assert end.finish_reason is FinishReason.ABORT
    assert end.output_tokens[:9] == before.tokens(0)
    assert end.output_text.startswith("".join(delta.chunk for delta in before.deltas))


async def test_what_is_wrong_is_said(engines: tuple[LLMEngine, LLMEngine]) -> None:
    engine = engines[1]
    request = Request(prompt=[9, 8], max_tokens=4, sampling_params={"n": 2, "temperature": 1.0})
    for token_ids, message in (([[3]], "holds 1 lists, the request asks for 2"), ([[3], [999]], "token id 999")):
        point = ResumePoint(output_token_ids=token_ids, seed=1)
        with pytest.raises(InvalidArgumentError, match=message) as caught:
            await engine.execute(request.model_copy(update={"resume_from": point}))
        assert caught.value.context["field"] == "resume_from.output_token_ids"


async def test_tokens_that_the_form_does_not_allow(builtin: LLMEngine) -> None:
    request = Request.model_validate(
        {"prompt": "Well?", "structured_output": {"choice": ["yes", "no"]}, "max_tokens": 5}
    )
    point = ResumePoint(output_token_ids=[[7, 7, 7]], seed=0)
    response = await builtin.execute(request.model_copy(update={"resume_from": point}))
    assert response.error is not None
    assert response.error.code is ErrorCode.INVALID_ARGUMENT
    assert response.output_tokens == [7, 7, 7]


async def test_given_prompt_tokens_are_taken(builtin: LLMEngine) -> None:
    plain = Request(prompt="What is a token?", max_tokens=5)
    token_ids = builtin.tokenizer.encode("What is a token?")
    given = plain.model_copy(update={"prompt_token_ids": token_ids, "prompt": "something else"})
    assert (await builtin.execute(given)).output_tokens == (await builtin.execute(plain)).output_tokens
    with pytest.raises(InvalidArgumentError, match="prompt_token_ids holds the token id 99999999"):
        await builtin.execute(given.model_copy(update={"prompt_token_ids": [99999999]}))
