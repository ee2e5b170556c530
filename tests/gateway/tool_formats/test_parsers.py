"""Tool calls in model families' notations: found, streamed and never lost, however the text is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_gateway.pieces import AnswerChoice, Piece, TextPiece, ToolCallPiece, collect
from sagellm_gateway.tool_formats import FORMATS, ToolFormat, for_template
from sagellm_gateway.tool_formats.hermes import HermesFormat
from sagellm_gateway.tool_formats.llama3 import Llama3Format
from sagellm_gateway.tool_formats.mistral import MistralFormat
from sagellm_gateway.tool_formats.plain import PlainFormat

CALL = '{"name": "f", "arguments": {"a": [1, {"b": "}"}], "c": "\\"</tool_call>"}}'
ARGUMENTS = '{"a": [1, {"b": "}"}], "c": "\\"</tool_call>"}'
EMPTY = '{"name": "g", "arguments": {}}'

# format, text, text that is left, calls
CASES: list[tuple[type[ToolFormat], str, str, list[tuple[str, str]]]] = [
    (HermesFormat, "Hello <b> there </tool_call>", "Hello <b> there </tool_call>", []),
    (HermesFormat, f"<tool_call>\n{CALL}\n</tool_call>", "", [("f", ARGUMENTS)]),
    (
        HermesFormat,
        f"Well.\n\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{EMPTY}</tool_call>\n",
        "Well.",
        [("f", ARGUMENTS), ("g", "{}")],
    ),
    (HermesFormat, f"<tool_call>{EMPTY}</tool_call>\nDone.", "Done.", [("g", "{}")]),
    (HermesFormat, "<tool_call>no json</tool_call> x", "<tool_call>no json</tool_call> x", []),
    (HermesFormat, '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    (HermesFormat, '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
    (HermesFormat, '<tool_call>{"name": "f", "arguments": {"x": "cut', "", [("f", '{"x": "cut')]),
    (HermesFormat, "a <tool_c", "a <tool_c", []),
    (Llama3Format, "Hello {you}", "Hello {you}", []),
    (Llama3Format, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        Llama3Format,
        '<|python_tag|>{"name": "f", "parameters": {"a": {}}}; {"name": "g", "parameters": {}}',
        "",
        [("f", '{"a": {}}'), ("g", "{}")],
    ),
    (Llama3Format, '{"answer": 42} is it', '{"answer": 42} is it', []),
    (MistralFormat, "Hello [TOOL", "Hello [TOOL", []),
    (MistralFormat, f"[TOOL_CALLS] [{CALL}, {EMPTY}]", "", [("f", ARGUMENTS), ("g", "{}")]),
    (MistralFormat, f"Ok[TOOL_CALLS]f[ARGS]{ARGUMENTS}[TOOL_CALLS]g{{}}", "Ok", [("f", ARGUMENTS), ("g", "{}")]),
    (PlainFormat, f"{CALL}\n{EMPTY}", "", [("f", ARGUMENTS), ("g", "{}")]),
    (PlainFormat, "Just text", "Just text", []),
]


def read(form: type[ToolFormat], chunks: list[str]) -> list[Piece]:
    parser = form().parser(0, [])
    return [*(piece for chunk in chunks for piece in parser.feed(chunk)), *parser.end()]


def told(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    choice = (collect(pieces).choices or [AnswerChoice()])[0]
    return choice.text, [(call.function.name, call.function.arguments) for call in choice.tool_calls]


@pytest.mark.parametrize(("form", "text", "left", "calls"), CASES)
def test_the_text_as_a_whole(form: type[ToolFormat], text: str, left: str, calls: list[tuple[str, str]]) -> None:
    assert told(read(form, [text])) == (left, calls)


@pytest.mark.parametrize(("form", "text", "left", "calls"), CASES)
def test_character_by_character(form: type[ToolFormat], text: str, left: str, calls: list[tuple[str, str]]) -> None:
    assert told(read(form, list(text))) == (left, calls)


@given(data=st.data(), case=st.sampled_from(CASES))
def test_any_cut_tells_the_same(
    data: st.DataObject, case: tuple[type[ToolFormat], str, str, list[tuple[str, str]]]
) -> None:
    form, text, left, calls = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert told(read(form, chunks)) == (left, calls)


@given(
    form=st.sampled_from(FORMATS),
    parts=st.lists(
        st.sampled_from(
            [
                *(
                    "<tool_call>",
                    "</tool_call>",
                    "[TOOL_CALLS]",
                    "[ARGS]",
                    "<|python_tag|>",
                    "{",
                    "}",
                    '"name": ',
                    '"f", ',
                ),
                *('"arguments": ', '"', "\\", "[", "]", ";", "x ", "\n", CALL, EMPTY),
            ]
        ),
        max_size=12,
    ),
)
def test_nothing_breaks_a_parser_and_cuts_never_matter(form: type[ToolFormat], parts: list[str]) -> None:
    whole = told(read(form, ["".join(parts)]))
    assert told(read(form, parts)) == whole
    assert told(read(form, list("".join(parts)))) == whole


def test_text_goes_out_at_once_and_arguments_stream() -> None:
    parser = HermesFormat().parser(0, [])
    assert parser.feed("Hello") == [TextPiece(0, "Hello")]
    parser.feed(' <tool_call>{"name": "f", "arg')
    name, first = parser.feed('uments": {"city": "Par')
    assert isinstance(name, ToolCallPiece)
    assert (name.name, name.arguments, len(name.id or "")) == ("f", "", 29)
    assert first == ToolCallPiece(0, 0, '{"city": "Par')
    assert parser.feed('is"}') == [ToolCallPiece(0, 0, 'is"')]
    assert parser.feed("}</tool_call>") == [ToolCallPiece(0, 0, "}")]
    assert parser.end() == []


def test_mistral_ids_have_nine_characters() -> None:
    piece = read(MistralFormat, [f"[TOOL_CALLS] [{EMPTY}]"])[0]
    assert isinstance(piece, ToolCallPiece)
    assert piece.id is not None
    assert len(piece.id) == 9
    assert piece.id.isalnum()


def test_templates_choose_the_family() -> None:
    qwen = '<tools>...</tools> <tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <args-json-object>}\\n</tool_call>'
    assert isinstance(for_template(qwen), HermesFormat)
    llama = '<|start_header_id|>... if tools ... {"name": function name, "parameters": dictionary}'
    assert isinstance(for_template(llama), Llama3Format)
    assert isinstance(for_template("[AVAILABLE_TOOLS] ... [TOOL_CALLS]"), MistralFormat)
    assert isinstance(for_template(None), PlainFormat)


def test_arguments_are_the_text_that_the_model_wrote() -> None:
    odd = '{"name": "f", "arguments": {"b":1,   "a" : 2.50 }}'
    _, calls = told(read(HermesFormat, [f"<tool_call>{odd}</tool_call>"]))
    assert calls == [("f", '{"b":1,   "a" : 2.50 }')]
    assert json.loads(calls[0][1]) == {"a": 2.5, "b": 1}
