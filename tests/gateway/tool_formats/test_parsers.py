"""Tool calls in model families' notations: found, streamed and never lost, however the text is cut."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_gateway.pieces import AnswerChoice, Piece, TextPiece, ToolCallPiece, collect
from sagellm_gateway.tool_formats import ToolFormat, for_template
from sagellm_gateway.tool_formats.deepseek import DeepSeekFormat
from sagellm_gateway.tool_formats.hermes import HermesFormat
from sagellm_gateway.tool_formats.llama3 import Llama3Format
from sagellm_gateway.tool_formats.mistral import MistralFormat
from sagellm_gateway.tool_formats.plain import PlainFormat
from sagellm_gateway.tool_formats.qwen3_coder import Qwen3CoderFormat
from sagellm_protocol import Tool
from sagellm_protocol.messages import MAX_TOOL_NAME

HERMES, LLAMA, MISTRAL, PLAIN = HermesFormat(), Llama3Format(), MistralFormat(), PlainFormat()
CODER, DEEPSEEK = Qwen3CoderFormat(), DeepSeekFormat()
FAMILIES = [HERMES, LLAMA, MISTRAL, PLAIN, CODER, DEEPSEEK]

PROPERTIES = {
    "a": {"type": "integer"},
    "text": {"type": "string"},
    "any": {},
    "list": {"type": "array"},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": name, "parameters": {"properties": PROPERTIES}}})
    for name in ("f", "g", "get.the-thing_2")
]

CALL = '{"name": "f", "arguments": {"a": [1, {"b": "}"}], "c": "\\"</tool_call>"}}'
ARGUMENTS = '{"a": [1, {"b": "}"}], "c": "\\"</tool_call>"}'
EMPTY = '{"name": "g", "arguments": {}}'
NO_OBJECT = '{"name": "f", "arguments": [1]}'
UNKNOWN = '{"name": "unknown", "arguments": {}}'
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ONE, SEP, ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

Case = tuple[ToolFormat, str, str, list[tuple[str, str]]]

# format, text, text that is left, calls
CASES: list[Case] = [
    (HERMES, "Hello <b> there </tool_call>", "Hello <b> there </tool_call>", []),
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [("f", ARGUMENTS)]),
    (
        HERMES,
        f"Well.\n\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{EMPTY}</tool_call>\n",
        "Well.",
        [("f", ARGUMENTS), ("g", "{}")],
    ),
    (HERMES, f"<tool_call>{EMPTY}</tool_call>\nDone. ", "Done. ", [("g", "{}")]),
    (HERMES, f"So:\n<tool_call>{EMPTY}</tool_call>\nDone.", "So:\nDone.", [("g", "{}")]),
    (HERMES, "<tool_call>no json</tool_call> x", "<tool_call>no json</tool_call> x", []),
    (HERMES, '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    (HERMES, f"<tool_call> <tool_call>{EMPTY}</tool_call>", "<tool_call>", [("g", "{}")]),
    (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"x": "cut', "", [("f", '{"x": "cut')]),
    (HERMES, '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    (HERMES, f"<tool_call>{EMPTY}</tool_c", "", [("g", "{}")]),
    (HERMES, f"<tool_call>{EMPTY} and then <tool_call>{CALL}", "and then", [("g", "{}"), ("f", ARGUMENTS)]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (HERMES, f"<tool_call>{NO_OBJECT}</tool_call>", f"<tool_call>{NO_OBJECT}</tool_call>", []),
    # An undeclared tool, a string that does not end, a brace that is missing, members behind the arguments.
    (HERMES, f"<tool_call>{UNKNOWN}</tool_call>", f"<tool_call>{UNKNOWN}</tool_call>", []),
    (
        HERMES,
        f'<tool_call>\n{{"name": "f", "arguments": {{"a": "b}}}}\n</tool_call>\n<tool_call>\n{EMPTY}\n</tool_call>',
        "",
        [("f", '{"a": "b}}'), ("g", "{}")],
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>', "", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}, "id": "x}"}</tool_call>.', ".", [("f", '{"a": 1}')]),
    (HERMES, "a <tool_c", "a <tool_c", []),
    (LLAMA, "Hello {you}", "Hello {you}", []),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (LLAMA, '\n{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        LLAMA,
        '<|python_tag|>{"name": "f", "parameters": {"a": {}}}; {"name": "g", "parameters": {}}',
        "",
        [("f", '{"a": {}}'), ("g", "{}")],
    ),
    (
        LLAMA,
        'Ok.<|python_tag|>{"name": "get.the-thing_2"}<|python_tag|>{"name": "f"} x',
        "Ok. x",
        [("get.the-thing_2", "{}"), ("f", "{}")],
    ),
    (LLAMA, '{"answer": 42} is it', '{"answer": 42} is it', []),
    (LLAMA, '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', []),
    (LLAMA, '[1] {"name": "f"}', '[1] {"name": "f"}', []),
    (LLAMA, '<|python_tag|>search.call(query="x")', '<|python_tag|>search.call(query="x")', []),
    (MISTRAL, "Hello [TOOL", "Hello [TOOL", []),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}, {EMPTY}]", "", [("f", ARGUMENTS), ("g", "{}")]),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcdefghi"}]</s>', "</s>", [("f", "{}")]),
    (MISTRAL, f"[TOOL_CALLS] [{EMPTY}, 3]", ", 3]", [("g", "{}")]),
    (MISTRAL, "[TOOL_CALLS] [3]", "[TOOL_CALLS] [3]", []),
    (MISTRAL, f"Ok[TOOL_CALLS]f[ARGS]{ARGUMENTS}[TOOL_CALLS]g{{}}", "Ok", [("f", ARGUMENTS), ("g", "{}")]),
    (MISTRAL, '[TOOL_CALLS]f[CALL_ID]aB3[ARGS]{"a": 1}', "", [("f", '{"a": 1}')]),
    (MISTRAL, "[TOOL_CALLS]h[ARGS]{}", "[TOOL_CALLS]h[ARGS]{}", []),
    (MISTRAL, "[TOOL_CALLS]f", "[TOOL_CALLS]f", []),
    (PLAIN, f"{CALL}\n{EMPTY}", "", [("f", ARGUMENTS), ("g", "{}")]),
    (PLAIN, f" [{CALL}, {EMPTY}]\n", "", [("f", ARGUMENTS), ("g", "{}")]),
    (PLAIN, "Just text ", "Just text ", []),
    (PLAIN, "[see below] Text", "[see below] Text", []),
    (CODER, "<tool_call>\n<function=f>\n</function>\n</tool_call>", "", [("f", "{}")]),
    (
        CODER,
        'Ok.\n<tool_call>\n<function=f>\n<parameter=a>\n 5\n</parameter>\n<parameter=text>\n5 "<b>"\n\n</parameter>\n'
        "</function>\n</tool_call>\n<tool_call>\n<function=g>\n<parameter=any>[1]</parameter></function></tool_call>",
        "Ok.",
        [("f", '{"a": 5, "text": "5 \\"<b>\\"\\n"}'), ("g", '{"any": [1]}')],
    ),
    (CODER, "<function=f>\n<parameter=new>\nTrue\n</parameter>\n</function>", "", [("f", '{"new": true}')]),
    (CODER, "<function=f><parameter=text>\n</parameter></function>", "", [("f", '{"text": ""}')]),
    (CODER, "<function=f><parameter=list>['x', None]</parameter></function>", "", [("f", '{"list": ["x", null]}')]),
    (CODER, "<function=f><parameter=maybe>null</parameter></function>", "", [("f", '{"maybe": null}')]),
    (CODER, "<function=f><parameter=maybe>\n5\n</parameter></function>", "", [("f", '{"maybe": "5"}')]),
    (CODER, "<function=f>\n<parameter=text>\ncu", "", [("f", '{"text": "cu')]),
    (CODER, "<function=h>\n</function>", "<function=h>\n</function>", []),
    (CODER, "<tool_call>\n<functional=f>", "<tool_call>\n<functional=f>", []),
    (CODER, "<function=f>\noops</function>", "oops</function>", [("f", "{}")]),
    (
        DEEPSEEK,
        f"Ok{BEGIN}{ONE}f{SEP}{ARGUMENTS}{ONE_END}{ONE}g{SEP}{{}}{ONE_END}{END}",
        "Ok",
        [("f", ARGUMENTS), ("g", "{}")],
    ),
    (
        DEEPSEEK,
        f"{BEGIN}{ONE}function{SEP}f\n```json\n{ARGUMENTS}\n```{ONE_END}\n{ONE}function{SEP}g\n```json\n{{}}\n```{ONE_END}{END}",
        "",
        [("f", ARGUMENTS), ("g", "{}")],
    ),
    (DEEPSEEK, f"{BEGIN}{ONE}h{SEP}{{}}{ONE_END}{END}", f"{BEGIN}{ONE}h{SEP}{{}}{ONE_END}{END}", []),
    (DEEPSEEK, f"{BEGIN}{ONE}f{SEP}{{}} then", "then", [("f", "{}")]),
    (DEEPSEEK, f'{BEGIN}{ONE}f{SEP}{{"a": "b{ONE_END}{END}', "", [("f", '{"a": "b')]),
    (DEEPSEEK, f"{BEGIN} none", f"{BEGIN} none", []),
]


def read(form: ToolFormat, chunks: list[str], tools: list[Tool] = TOOLS) -> list[Piece]:
    parser = form.parser(0, tools)
    return [*(piece for chunk in chunks for piece in parser.feed(chunk)), *parser.end()]


def told(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    choice = (collect(pieces).choices or [AnswerChoice()])[0]
    return choice.text, [(call.function.name, call.function.arguments) for call in choice.tool_calls]


@pytest.mark.parametrize(("form", "text", "left", "calls"), CASES)
def test_as_a_whole_and_character_by_character(
    form: ToolFormat, text: str, left: str, calls: list[tuple[str, str]]
) -> None:
    assert told(read(form, [text])) == (left, calls)
    assert told(read(form, list(text))) == (left, calls)


@given(data=st.data(), case=st.sampled_from(CASES))
def test_any_cut_tells_the_same(data: st.DataObject, case: Case) -> None:
    form, text, left, calls = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert told(read(form, chunks)) == (left, calls)


FRAGMENTS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        BEGIN,
        END,
        ONE,
        SEP,
        ONE_END,
    ),
    *(
        "<function=",
        "</function>",
        "<parameter=",
        "</parameter>",
        "f",
        ">",
        "a",
        "text",
        "any",
        "function",
        "```",
        "json",
    ),
    *(
        "{",
        "}",
        '"name": ',
        '"f", ',
        '"arguments": ',
        '"',
        "\\",
        "[",
        "]",
        ";",
        ",",
        ":",
        "1",
        "x ",
        " ",
        "\n",
        CALL,
        EMPTY,
    ),
    *(
        "<tool_call>\n<function=f>\n",
        "<parameter=text>\n",
        "\n</parameter>\n",
        f"{BEGIN}{ONE}f{SEP}",
        "[TOOL_CALLS]f[ARGS]",
    ),
]


@given(form=st.sampled_from(FAMILIES), parts=st.lists(st.sampled_from(FRAGMENTS), max_size=14))
def test_nothing_breaks_a_parser_and_cuts_never_matter(form: ToolFormat, parts: list[str]) -> None:
    whole = told(read(form, ["".join(parts)]))
    assert told(read(form, parts)) == whole
    assert told(read(form, list("".join(parts)))) == whole


@given(form=st.sampled_from(FAMILIES), text=st.text(st.sampled_from('ab "{}[]<>|=_/,:\n'), max_size=60))
def test_text_without_calls_comes_out_as_it_was(form: ToolFormat, text: str) -> None:
    assert told(read(form, list(text))) == (text, [])


@pytest.mark.parametrize("form", FAMILIES)
def test_text_goes_out_at_once(form: ToolFormat) -> None:
    parser = form.parser(0, TOOLS)
    for word in ("Hello", " world", ' "a": {1}', " <", "b> [x]", " <|p"):
        parser.feed(word)
    shown = told([*form.parser(0, TOOLS).feed("Hello world <b> [x] {y")])[0]
    assert shown == "Hello world <b> [x] {y"


@pytest.mark.parametrize("form", [LLAMA, PLAIN])
def test_json_that_is_no_call_goes_out_at_its_first_key(form: ToolFormat) -> None:
    assert told(form.parser(0, TOOLS).feed('{"nam')) == ("", [])
    assert told(form.parser(0, TOOLS).feed('{"ans')) == ('{"ans', [])


def test_arguments_stream() -> None:
    parser = HERMES.parser(3, TOOLS)
    assert parser.feed("Hello") == [TextPiece(3, "Hello")]
    assert parser.feed(' <tool_call>{"name": "f", "arg') == []
    name, first = parser.feed('uments": {"city": "Par')
    assert isinstance(name, ToolCallPiece)
    assert (name.index, name.call, name.name, name.arguments, len(name.id or "")) == (3, 0, "f", "", 29)
    assert first == ToolCallPiece(3, 0, '{"city": "Par')
    assert parser.feed('is"}') == [ToolCallPiece(3, 0, 'is"}')]
    assert parser.feed("}</tool_call>") == []
    assert parser.end() == []


def test_text_arguments_of_qwen3_coder_stream() -> None:
    parser = CODER.parser(0, TOOLS)
    parser.feed("<tool_call>\n<function=f>\n<parameter=text>")
    assert parser.feed("\nHello") == [ToolCallPiece(0, 0, '"Hello')]
    assert parser.feed(' "you"\n') == [ToolCallPiece(0, 0, ' \\"you\\"')]
    assert parser.feed("</parameter>\n</function>") == [ToolCallPiece(0, 0, '"}')]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, '<tool_call>{"name": "NAME", "arguments": {}}</tool_call>'),
        (LLAMA, '{"name": "NAME", "parameters": {}}'),
        (MISTRAL, "[TOOL_CALLS]NAME[ARGS]{}"),
        (CODER, "<tool_call>\n<function=NAME>\n</function>\n</tool_call>"),
        (DEEPSEEK, f"{BEGIN}{ONE}NAME{SEP}{{}}{ONE_END}{END}"),
        (DEEPSEEK, f"{BEGIN}{ONE}function{SEP}NAME\n```json\n{{}}\n```{ONE_END}{END}"),
    ],
)
def test_the_longest_name_is_read_as_it_comes(form: ToolFormat, text: str) -> None:
    name = "n" * MAX_TOOL_NAME
    tool = Tool.model_validate({"type": "function", "function": {"name": name}})
    assert told(read(form, list(text.replace("NAME", name)), [tool])) == ("", [(name, "{}")])


def test_ids_are_fresh_and_of_the_form_that_the_family_demands() -> None:
    ids = [
        piece.id
        for form in (HERMES, MISTRAL)
        for piece in read(form, [f"<tool_call>{EMPTY}</tool_call>[TOOL_CALLS] [{EMPTY}]"])
        if isinstance(piece, ToolCallPiece) and piece.id
    ]
    assert len(set(ids)) == 2
    assert re.fullmatch("call_[a-zA-Z0-9]{24}", ids[0])
    assert re.fullmatch("[a-zA-Z0-9]{9}", ids[1])  # what Mistral's templates accept


def test_arguments_are_the_text_that_the_model_wrote() -> None:
    odd = '{"b":1,   "a" : 2.50 }'
    _, calls = told(read(HERMES, [f'<tool_call>{{"name":"f","arguments":{odd}}}</tool_call>']))
    assert calls == [("f", odd)]
    assert json.loads(calls[0][1]) == {"a": 2.5, "b": 1}


def test_a_long_call_costs_time_in_proportion() -> None:
    arguments = json.dumps({"text": "x" * 2_000_000})
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    chunks = [text[i : i + 20] for i in range(0, len(text), 20)]
    parser = HERMES.parser(0, TOOLS)  # some 100,000 chunks: read again each time, they would take minutes
    assert sum(
        len(piece.arguments) for c in chunks for piece in parser.feed(c) if isinstance(piece, ToolCallPiece)
    ) == len(arguments)


def test_templates_choose_the_family() -> None:
    qwen = '<tools>...</tools> <tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <args-json-object>}\\n</tool_call>'
    assert for_template(qwen).name == "hermes"
    llama = '<|start_header_id|>... if tools ... {"name": function name, "parameters": dictionary}'
    assert for_template(llama).name == "llama3"
    assert for_template("[AVAILABLE_TOOLS] ... [TOOL_CALLS]").name == "mistral"
    assert for_template(None).name == "plain"
