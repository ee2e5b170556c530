"""How a chat request becomes an engine's request: forms, marks, template variables."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sagellm_gateway.chat_plan import ChatPlan, ChatPlanner
from sagellm_gateway.context import Caller
from sagellm_gateway.pieces import AnswerChoice, ChoiceEnd, ReasoningPiece, TextPiece, ToolCallPiece
from sagellm_protocol import (
    SLO,
    FinishReason,
    ModelDescription,
    RequestPriority,
    UnsupportedError,
)
from sagellm_protocol.openai import ChatCompletionRequest
from sagellm_protocol.response import CompletionOutput

QWEN = '{% if tools %}<tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}'
QWEN3 = QWEN + "{% if enable_thinking %}<think>\n\n</think>{% endif %}"
R1 = QWEN + "<think>\n{{ content.split('</think>') }}"
TOKENS = {"<tool_call>": 5, "</tool_call>": 6, "<think>": 7, "</think>": 8}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
STRICT = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}, "strict": True}}
CALLER = Caller("call", "0" * 32, "ada", priority=RequestPriority.HIGH, slo=SLO(ttft_ms=100))


class Manager:
    """One model, of which the marks are tokens."""

    def __init__(self, chat_template: str | None, prompt: str) -> None:
        self._description = ModelDescription(
            model="m", vocab_size=9, hidden_size=1, max_model_len=9, chat_template=chat_template
        )
        self._prompt = prompt
        self.num_calls = 0

    async def describe_model(self, model: str) -> ModelDescription:
        return self._description

    async def tokenize(self, model: str, **fields: Any) -> list[int]:
        self.num_calls += 1
        return [TOKENS[fields["prompt"]]] if "prompt" in fields else [0]

    async def detokenize(self, model: str, token_ids: list[int]) -> str:
        return next((mark for mark, token_id in TOKENS.items() if [token_id] == token_ids), self._prompt)


def planner(chat_template: str | None, prompt: str = "") -> ChatPlanner:
    return ChatPlanner(SimpleNamespace(manager=Manager(chat_template, prompt)))  # type: ignore[arg-type]


async def plan(chat_template: str | None, prompt: str = "", **body: Any) -> ChatPlan:
    call = ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **body})
    return await planner(chat_template, prompt).plan(call, CALLER)


def grammar_of(made: ChatPlan) -> str:
    form = made.request.structured_output
    assert form is not None
    assert form.grammar is not None
    return form.grammar


async def test_forced_calls_name_the_models_own_tokens() -> None:
    made = await plan(QWEN, tools=[WEATHER], tool_choice="required")
    assert grammar_of(made).startswith("start: <[5]> calls\n")
    assert "<[6]>" in grammar_of(made)
    assert made.request.sampling_params is not None
    assert made.request.sampling_params.skip_special_tokens is False


async def test_auto_is_free_unless_a_tool_is_strict() -> None:
    assert (await plan(QWEN, tools=[WEATHER])).request.structured_output is None
    assert "beginning calls" in grammar_of(await plan(QWEN, tools=[STRICT]))
    assert (await plan(QWEN, tools=[STRICT], tool_choice="none")).request.structured_output is None


async def test_a_named_tool_is_the_only_one_in_the_grammar() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    choice = {"type": "function", "function": {"name": "other"}}
    grammar = grammar_of(await plan(QWEN, tools=[WEATHER, other], tool_choice=choice))
    assert "other" in grammar
    assert "get_weather" not in grammar


async def test_a_form_follows_the_thought_that_the_prompt_opens() -> None:
    made = await plan(R1, "<think>\n", tools=[WEATHER], tool_choice="required")
    assert made.opens_thought
    assert grammar_of(made).startswith("start: thought BLANKS? answer\nthought: /(?s:.+)/? <[8]>\n")
    json_too = await plan(R1, "<think>\n", response_format={"type": "json_object"})
    assert "<[8]>" in grammar_of(json_too)


async def test_a_form_switches_thoughts_off_where_the_template_can() -> None:
    made = await plan(QWEN3, "</think>", tools=[WEATHER], tool_choice="required")
    assert made.request.chat_template_kwargs == {"enable_thinking": False}
    assert not made.opens_thought


async def test_tools_of_a_template_without_tools_must_be_forced() -> None:
    with pytest.raises(UnsupportedError, match="no place for them"):
        await plan("{{ messages }}", tools=[WEATHER])
    assert '"["' in grammar_of(await plan("{{ messages }}", tools=[WEATHER], tool_choice="required"))


async def test_with_a_form_the_model_may_still_call() -> None:
    made = await plan(QWEN, tools=[WEATHER], response_format={"type": "json_object"})
    assert grammar_of(made).startswith("start: <[5]> calls | answer\nanswer: %json {")
    open_thought = await plan(R1, "<think>\n", tools=[WEATHER], guided_choice=["yes", "no"])
    assert grammar_of(open_thought).startswith("start: thought BLANKS? answer\n")
    assert 'answer: "yes" | "no"' in grammar_of(open_thought)


async def test_the_model_is_asked_once() -> None:
    asked = planner(QWEN3)
    call = ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": [WEATHER], "tool_choice": "required"}
    )
    for _ in range(3):
        await asked.plan(call, CALLER)
    assert asked._gateway.manager.num_calls == 5  # four marks and one prompt


async def test_a_model_that_comes_to_anothers_name_is_asked_anew() -> None:
    asked = planner(QWEN3)
    call = ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": [WEATHER], "tool_choice": "required"}
    )
    await asked.plan(call, CALLER)
    asked._gateway.manager = Manager(R1, "<think>\n")  # type: ignore[assignment]
    made = await asked.plan(call, CALLER)
    assert made.opens_thought
    assert asked._gateway.manager.num_calls == 5


async def test_the_reader_parts_thoughts_text_and_calls() -> None:
    made = await plan(R1, "<think>\n", tools=[WEATHER])
    reader = made.reader(0)
    text = 'Hm.</think>\n\nLook:\n<tool_call>\n{"name": "get_weather", "arguments": {"x": 1}}\n</tool_call>'
    pieces = [piece for char in text for piece in reader.feed(char, None)]
    pieces += reader.end(CompletionOutput.model_validate({"index": 0, "text": text, "finish_reason": "stop"}))
    assert "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece)) == "Hm."
    assert "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)) == "Look:"
    assert "".join(piece.arguments for piece in pieces if isinstance(piece, ToolCallPiece)) == '{"x": 1}'
    assert isinstance(pieces[-1], ChoiceEnd)
    assert pieces[-1].finish_reason == "tool_calls"


async def test_one_call_is_enough_where_parallel_calls_are_off() -> None:
    made = await plan(QWEN, tools=[WEATHER], parallel_tool_calls=False)
    reader = made.reader(0)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>\n'
    pieces = reader.feed(call * 3, None)
    assert {piece.call for piece in pieces if isinstance(piece, ToolCallPiece)} == {0}


async def test_a_request_is_made_in_its_callers_name() -> None:
    request = (await plan(QWEN)).request
    assert request.request_id.startswith("call-")
    assert (request.trace_id, request.tenant) == (CALLER.trace_id, "ada")
    assert (request.priority, request.slo) == (RequestPriority.HIGH, CALLER.slo)
    assert (await plan(QWEN)).request.request_id != request.request_id


async def test_what_a_body_says_of_its_request_goes_before_its_caller() -> None:
    request = (await plan(QWEN, request_id="mine", priority="low")).request
    assert (request.request_id, request.priority) == ("mine", RequestPriority.LOW)


@pytest.mark.parametrize(("template", "body"), [(None, {}), (QWEN, {"tools": [WEATHER]}), (R1, {})])
async def test_a_whole_output_reads_as_its_pieces_do(template: str | None, body: dict[str, Any]) -> None:
    made = await plan(template, **body)
    text = 'Hm.</think>It rains.<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    output = CompletionOutput(text=text, finish_reason=FinishReason.STOP)
    reader, choice = made.reader(0), AnswerChoice()
    for piece in (*reader.feed(text, None), *reader.end(output)):
        choice.add(piece)
    read = made.read(output)
    for call in (*read.tool_calls, *choice.tool_calls):  # whose ids are fresh
        assert call.id
    assert [call.function for call in read.tool_calls] == [call.function for call in choice.tool_calls]
    assert replace(read, tool_calls=[]) == replace(choice, tool_calls=[])
    assert bool(read.tool_calls) == ("tools" in body)
