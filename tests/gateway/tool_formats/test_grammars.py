"""What a grammar allows is what the parser of the same family reads: calls of the declared tools, arguments valid."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from sagellm_core.structured.compiler import CompiledGrammar, CompileLimits
from sagellm_core.structured.vocabulary import Vocabulary
from sagellm_core.tokenizer import Tokenizer
from sagellm_gateway.pieces import AnswerChoice, collect
from sagellm_gateway.tool_formats import ToolFormat
from sagellm_gateway.tool_formats.deepseek import DeepSeekFormat
from sagellm_gateway.tool_formats.hermes import HermesFormat
from sagellm_gateway.tool_formats.llama3 import Llama3Format
from sagellm_gateway.tool_formats.mistral import MistralFormat
from sagellm_gateway.tool_formats.plain import PlainFormat
from sagellm_gateway.tool_formats.qwen3_coder import Qwen3CoderFormat
from sagellm_protocol import InvalidArgumentError, StructuredOutput, Tool

Writer = Callable[[StructuredOutput, int], str]
FAMILIES = [
    HermesFormat(),
    Llama3Format(),
    MistralFormat(),
    MistralFormat(is_named=True),
    PlainFormat(),
    Qwen3CoderFormat(),
    DeepSeekFormat(),
    DeepSeekFormat(is_coded=True),
]
IDS = ["hermes", "llama3", "mistral", "mistral_named", "plain", "qwen3_coder", "deepseek", "deepseek_coded"]
every_family = pytest.mark.parametrize("form", FAMILIES, ids=IDS)


def make_tool(name: str, parameters: dict[str, Any] | None, *, strict: bool | None = None) -> Tool:
    function = {"name": name, "description": "A tool.", "parameters": parameters, "strict": strict}
    return Tool.model_validate({"type": "function", "function": function})


WEATHER: dict[str, Any] = {
    "type": "object",
    "description": "Where and when",
    "properties": {
        "city": {"type": "string", "description": 'A "city"', "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 7, "title": "Days"},
        "unit": {"enum": ["C", "F"]},
        "place": {"$ref": "#/$defs/place"},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        "note": {"type": "string"},
    },
    "required": ["city", "unit", "place"],
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [make_tool("get_weather", WEATHER), make_tool("ping", None), make_tool("a.b-c", {"type": "object"})]
STRICT = [
    make_tool("get_weather", WEATHER, strict=True),
    make_tool("ping", {"type": "object", "properties": {"n": {"type": "integer"}}}),
]


def read(form: ToolFormat, text: str, tools: list[Tool] = TOOLS) -> AnswerChoice:
    parser = form.parser(0, tools)
    return (collect([*parser.feed(text), *parser.end()]).choices or [AnswerChoice()])[0]


def check(answer: AnswerChoice, tools: list[Tool]) -> None:
    """Every call is one of `tools`, its arguments as the schema demands."""
    declared = {tool.function.name: tool.function.parameters for tool in tools}
    for call in answer.tool_calls:
        arguments = json.loads(call.function.arguments)
        Draft202012Validator({"type": "object", **(declared[call.function.name] or {})}).validate(arguments)


@every_family
@pytest.mark.parametrize("only", [None, "get_weather", "ping"])
def test_forced_text_is_calls(form: ToolFormat, only: str | None, token_ids: Mapping[str, int], write: Writer) -> None:
    grammar = form.grammar(TOOLS, only=only, parallel=True, token_ids=token_ids)
    for seed in range(3):
        text = write(grammar, seed)
        answer = read(form, text)
        assert answer.text == "", text
        assert answer.tool_calls, text
        assert only is None or {call.function.name for call in answer.tool_calls} == {only}
        check(answer, TOOLS)


@every_family
def test_without_parallel_calls_there_is_one(form: ToolFormat, token_ids: Mapping[str, int], write: Writer) -> None:
    grammar = form.grammar(TOOLS, only=None, parallel=False, token_ids=token_ids)
    lazy = form.lazy_grammar(STRICT, parallel=False, token_ids=token_ids)
    for seed in range(3):
        assert len(read(form, write(grammar, seed)).tool_calls) == 1
        assert lazy is None or len(read(form, write(lazy, seed), STRICT).tool_calls) <= 1


def is_allowed(vocabulary: Vocabulary, tokenizer: Tokenizer, form: StructuredOutput, text: str) -> bool:
    """Whether a grammar allows a text in the tokens that the tokenizer makes of it, and its end."""
    matcher = CompiledGrammar(vocabulary, form, CompileLimits())._tokens.deep_copy()
    token_ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_ids[0]]
    return matcher.validate_tokens(token_ids) == len(token_ids)


PLACE = {"city": "Paris", "unit": "C", "place": {"x": 1.5}}
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ONE, SEP, ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
JSON = json.dumps(PLACE)
CODED = (
    "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=unit>\nC\n</parameter>\n"
    '<parameter=place>\n{"x": 1.5}\n</parameter>\n</function>'
)
# How templates show a model its own calls, so what it will write.
WRITTEN = {
    "hermes": f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>',
    "llama3": f'{{"name": "get_weather", "parameters": {JSON}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {JSON}}}]',
    "mistral_named": f"[TOOL_CALLS]get_weather[ARGS]{JSON}",
    "plain": f'[{{"name": "get_weather", "arguments": {JSON}}}]',
    "qwen3_coder": f"<tool_call>\n{CODED}\n</tool_call>",
    "deepseek": f"{BEGIN}{ONE}get_weather{SEP}{JSON}{ONE_END}{END}",
    "deepseek_coded": f"{BEGIN}{ONE}function{SEP}get_weather\n```json\n{JSON}\n```{ONE_END}{END}",
}


@pytest.mark.parametrize(("form", "name"), list(zip(FAMILIES, IDS, strict=True)), ids=IDS)
def test_the_tokens_of_the_familys_own_notation_are_allowed(
    form: ToolFormat, name: str, tokenizer: Tokenizer, vocabulary: Vocabulary, token_ids: Mapping[str, int]
) -> None:
    text = WRITTEN[name]
    assert [json.loads(call.function.arguments) for call in read(form, text).tool_calls] == [PLACE]
    forced = form.grammar(TOOLS, only=None, parallel=True, token_ids=token_ids)
    assert is_allowed(vocabulary, tokenizer, forced, text)
    assert not is_allowed(vocabulary, tokenizer, forced, "Hello")
    lazy = form.lazy_grammar(STRICT, parallel=True, token_ids=token_ids)
    if lazy is not None:
        assert is_allowed(vocabulary, tokenizer, lazy, text)
        assert is_allowed(vocabulary, tokenizer, lazy, "Hello <b>, [1] and so on.")
        assert is_allowed(vocabulary, tokenizer, lazy, "")
        assert not is_allowed(vocabulary, tokenizer, lazy, text.replace('"Paris"', "5").replace("unit", "until"))
        if form.opening is not None:
            assert is_allowed(vocabulary, tokenizer, lazy, f"I will look.\n\n{text}")


REPORT = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "sunny": {"type": "boolean"}},
    "required": ["name", "sunny"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(("form", "name"), list(zip(FAMILIES, IDS, strict=True)), ids=IDS)
def test_beside_a_form_an_answer_is_calls_or_of_that_form(
    form: ToolFormat,
    name: str,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    token_ids: Mapping[str, int],
    write: Writer,
) -> None:
    report = StructuredOutput(json_schema=REPORT)
    either = form.grammar_beside(report, TOOLS, parallel=True, token_ids=token_ids)
    answer = '{"name": "get", "sunny": true}'  # begins as a call of some families does
    assert is_allowed(vocabulary, tokenizer, either, WRITTEN[name])
    assert is_allowed(vocabulary, tokenizer, either, answer)
    assert not is_allowed(vocabulary, tokenizer, either, "Hello")
    assert not is_allowed(vocabulary, tokenizer, either, f"{answer}{WRITTEN[name]}")
    assert read(form, answer).text == answer
    for seed in range(4):
        written = read(form, write(either, seed))
        assert bool(written.tool_calls) != bool(written.text)
        check(written, TOOLS)
        assert not written.text or isinstance(json.loads(written.text)["sunny"], bool)


@every_family
def test_lazy_text_with_calls_has_valid_ones(form: ToolFormat, token_ids: Mapping[str, int], write: Writer) -> None:
    lazy = form.lazy_grammar(STRICT, parallel=True, token_ids=token_ids)
    if lazy is None:
        assert form.name == "plain"
        return
    for seed in range(4):
        answer = read(form, write(lazy, seed), STRICT)
        answer.tool_calls = [call for call in answer.tool_calls if call.function.name == "get_weather"]
        check(answer, STRICT)


def test_a_tool_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="names 'nobody'") as refused:
        HermesFormat().grammar(TOOLS, only="nobody", parallel=True)
    assert refused.value.context["field"] == "tool_choice"


def test_schemas_beyond_a_grammars_size_are_refused_under_their_own_name() -> None:
    properties = {f"property_{i}": {"type": "string", "description": "x" * 500} for i in range(300)}
    many = [make_tool(f"tool_{i}", {"type": "object", "properties": properties}) for i in range(2)]
    HermesFormat().grammar(many, only=None, parallel=True)  # descriptions don't count
    with pytest.raises(InvalidArgumentError) as refused:
        HermesFormat().grammar(many * 64, only=None, parallel=True)
    assert refused.value.context["field"] == "tools"


def test_a_strict_schema_that_cannot_be_held_to_is_refused_and_another_is_not(vocabulary: Vocabulary) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "contains": {"const": 1}}}}
    lenient = HermesFormat().grammar([make_tool("f", odd)], only=None, parallel=False)
    assert CompiledGrammar(vocabulary, lenient, CompileLimits())
    strict = HermesFormat().grammar([make_tool("f", odd, strict=True)], only=None, parallel=False)
    with pytest.raises(InvalidArgumentError, match="cannot be compiled"):
        CompiledGrammar(vocabulary, strict, CompileLimits())


def test_qwen3_coder_refuses_strict_patterns() -> None:
    tool = make_tool("f", {"type": "object", "properties": {"a": {"type": "string", "pattern": "^x$"}}}, strict=True)
    with pytest.raises(InvalidArgumentError, match="pattern of parameter 'a'"):
        Qwen3CoderFormat().grammar([tool], only=None, parallel=True)
