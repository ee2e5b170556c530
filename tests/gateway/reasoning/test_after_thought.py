"""Forms for what follows a thought: the thought is free, the answer is held to the form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from tokenizers import AddedToken

from sagellm_core.structured.compiler import CompiledGrammar, CompileLimits
from sagellm_core.structured.vocabulary import Vocabulary
from sagellm_core.tokenizer import FastBackend, Tokenizer
from sagellm_gateway.reasoning import FORMATS
from sagellm_gateway.tool_formats.hermes import HermesFormat
from sagellm_protocol import InvalidArgumentError, StructuredOutput, Tool
from small_tokenizers import byte_level_backend

Checker = Callable[[StructuredOutput, str], bool]
THINK = FORMATS[0]
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@pytest.fixture(scope="module", params=["tokens", "spelled"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    backend = byte_level_backend()
    if request.param == "tokens":
        backend.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    return Tokenizer(FastBackend(backend), special_tokens={"eos_token": "<|im_end|>"})


@pytest.fixture(scope="module")
def token_ids(tokenizer: Tokenizer) -> Mapping[str, int]:
    return {mark: token_id for mark in MARKS if (token_id := tokenizer.token_to_id(mark)) is not None}


@pytest.fixture(scope="module")
def is_allowed(tokenizer: Tokenizer) -> Checker:
    """Whether a grammar allows a text in the tokens that the tokenizer makes of it, and its end."""
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)

    def is_allowed(form: StructuredOutput, text: str) -> bool:
        matcher = CompiledGrammar(vocabulary, form, CompileLimits())._tokens.deep_copy()
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_ids[0]]
        return bool(matcher.validate_tokens(ids) == len(ids))

    return is_allowed


TOOL = Tool.model_validate({"type": "function", "function": {"name": "f"}})
# form, an answer of it, one that is not
FORMS: list[tuple[dict[str, Any], str, str]] = [
    ({"json_object": True}, '{"a": 1}', "[1]"),
    ({"json_schema": {"type": "array", "items": {"type": "integer"}}}, "[1, 2]", '["x"]'),
    ({"regex": "a/b{2}\\/c"}, "a/bb/c", "a/b/c"),
    ({"choice": ['"yes"', "no"]}, '"yes"', "yes"),
    ({"grammar": 'start: item+\nitem: "{" /[a-z]+/ "}"'}, "{a}{b}", "{1}"),
    ({"grammar": 'root ::= "x" [0-9]+'}, "x12", "x"),
]


@pytest.mark.parametrize(("form", "good", "bad"), FORMS)
def test_the_answer_is_held_to_the_form(
    is_allowed: Checker, token_ids: Mapping[str, int], form: dict[str, Any], good: str, bad: str
) -> None:
    after = THINK.after_thought(StructuredOutput.model_validate(form), token_ids=token_ids)
    assert is_allowed(after, f"Let me {{see}}: <b>\n{bad}</think>\n\n{good}")
    assert is_allowed(after, f"</think>{good}")
    assert not is_allowed(after, f"hm</think>\n\n{bad}")
    assert not is_allowed(after, good)


def test_a_thought_that_the_prompt_did_not_open_may_be_left_out(
    is_allowed: Checker, token_ids: Mapping[str, int]
) -> None:
    after = THINK.after_thought(StructuredOutput(json_object=True), is_open=False, token_ids=token_ids)
    assert is_allowed(after, "<think>\nhm\n</think>\n\n{}")
    assert is_allowed(after, "{}")
    assert not is_allowed(after, "<think>\nhm\n</think>\n\nno")


def test_calls_can_follow_a_thought(is_allowed: Checker, token_ids: Mapping[str, int]) -> None:
    calls = HermesFormat().grammar([TOOL], only=None, parallel=False, token_ids=token_ids)
    after = THINK.after_thought(calls, token_ids=token_ids)
    assert is_allowed(after, 'So.</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    assert not is_allowed(after, "So.</think>\n\nHello")


def test_what_is_no_grammar_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be read") as refused:
        THINK.after_thought(StructuredOutput(grammar='root ::= "open'))
    assert refused.value.context["field"] == "structured_output"
