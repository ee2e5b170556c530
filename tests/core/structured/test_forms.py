"""What each form becomes, what is refused and how, and the shortest completions of well-known cases."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sagellm_core.structured import CompileLimits, GrammarCompiler
from sagellm_core.structured.compiler import CompiledGrammar
from sagellm_core.structured.source import grammar_source
from sagellm_core.structured.vocabulary import Vocabulary
from sagellm_core.tokenizer import FastBackend, Tokenizer
from sagellm_protocol import InvalidArgumentError, ResourceExhaustedError, StructuredOutput, UnsupportedError
from small_tokenizers import sentencepiece_backend

Build = Callable[..., CompiledGrammar]

OPTIONAL = {
    "type": "object",
    "properties": {f"key{i}": {"enum": ["aaaa", "bb", "c"]} for i in range(10)},
    "required": ["key5", "key8"],
    "additionalProperties": False,
}
NUMBER = (
    '{"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": false}'
)
TOOL_CALL = f"""start: "<tool_call>" call "</tool_call>"
call: %json {NUMBER}
"""
THINKING = f"""start: think answer
think[lazy]: /(.|\\n)*<\\/think>/
answer: %json {NUMBER}
"""


@pytest.mark.parametrize(
    ("form", "shortest"),
    [
        ({"json_object": True}, "{}"),
        ({"json_schema": OPTIONAL}, '{"key5":"c","key8":"c"}'),
        ({"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 3}}, "[0,0,0]"),
        ({"json_schema": {"type": "string", "minLength": 40}}, '"' + 40 * "a" + '"'),
        ({"json_schema": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 7}]}}, "7"),
        ({"regex": "a(b|cde)*f"}, "af"),
        ({"regex": "[A-Z][a-z]+ is [0-9]{2}"}, "Aa is 00"),
        ({"regex": ""}, ""),
        ({"choice": ["no", "nope", "never"]}, "no"),
        ({"grammar": 'start: "a" ("b" | "c")* "done"'}, "adone"),
        ({"grammar": 'root ::= "x" [0-9]+ "y"'}, "x0y"),
        ({"grammar": TOOL_CALL}, '<tool_call>{"x":0}</tool_call>'),
        ({"grammar": THINKING}, '</think>{"x":0}'),
    ],
)
def test_shortest_completions(build: Build, form: dict[str, Any], shortest: str) -> None:
    completion = build(**form).completion
    assert completion is not None
    assert completion.symbols == shortest
    assert completion.num_tokens <= len(shortest)


def test_long_forms_are_within_reach(build: Build) -> None:
    inner = {"type": "object", "properties": {f"n{i}": {"enum": ["aaaa", "b"]} for i in range(8)}}
    inner = {**inner, "required": [f"n{i}" for i in range(8)], "additionalProperties": False}
    schema = {"type": "object", "properties": {f"key{i}": inner for i in range(20)}, "additionalProperties": False}
    completion = build(json_schema={**schema, "required": [f"key{i}" for i in range(20)]}).completion
    assert completion is not None
    document = json.loads(completion.symbols)
    assert document == {f"key{i}": {f"n{j}": "b" for j in range(8)} for i in range(20)}


def test_json_stands_on_one_line_with_or_without_blanks(build: Build, tokenizer: Tokenizer) -> None:
    for form in ({"json_schema": OPTIONAL}, {"grammar": f"start: schema\nschema: %json {json.dumps(OPTIONAL)}"}):
        grammar = build(**form)
        for text in ('{"key5":"c","key8":"c"}', '{"key5": "c", "key8": "c"}'):
            assert grammar.start(64, tokenizer.encode(text)).is_accepting
        for text in ('{\n"key5": "c", "key8": "c"}', '{"key5":  "c"', '{"key5" :'):
            with pytest.raises(InvalidArgumentError):
                grammar.start(64, tokenizer.encode(text))


def test_special_tokens_by_name_and_by_number(build: Build, vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    assert start is not None
    for name in ("<|im_start|>", f"<[{start}]>"):
        grammar = build(grammar=f'start: {name} "hi" /[0-9]+/')
        assert grammar.completion is not None
        assert grammar.completion.num_tokens == 1 + len(tokenizer.encode("hi")) + 1
        matcher = grammar.start(5)
        assert [matcher.accept(start, 4)] == [start]
        assert not matcher.is_accepting
    assert end in vocabulary.eos_token_ids
    # An ordinary token by its number has no symbol; such a grammar works, unsteered.
    assert build(grammar="start: <[300]>").completion is None


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"regex": "a(b"}, "unclosed group"),
        ({"grammar": "start: x"}, "unknown name"),
        ({"grammar": "root ::= ((("}, "cannot be read|cannot be compiled"),
        ({"json_schema": {"type": "object", "not": {}}}, "not"),
        ({"json_schema": {"$ref": "http://example.com/schema"}}, "does not fetch"),
        ({"json_schema": {"enum": []}}, "[Uu]nsatisfiable"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"regex": "[^\\s\\S]"}, "structured_output"),
        ({"json_schema": {"type": "string", "description": "x" * 300_000}}, "bytes, at most 262144"),
    ],
)
def test_what_cannot_be_compiled_is_said(build: Build, form: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidArgumentError, match=problem) as error:
        build(**form)
    assert error.value.context["field"] == "structured_output"
    assert len(error.value.message) < 600


def test_depth_is_bounded() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(40):
        schema = {"type": "array", "items": schema}
    wanted = StructuredOutput(json_schema=schema)
    assert grammar_source(wanted, max_bytes=10_000, max_depth=64)
    with pytest.raises(InvalidArgumentError, match="nested deeper than 32"):
        grammar_source(wanted, max_bytes=10_000, max_depth=32)


def test_sentencepiece_tokenizers(build: Build) -> None:
    tokenizer = Tokenizer(FastBackend(sentencepiece_backend()), special_tokens={"eos_token": "</s>"})
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    grammar = CompiledGrammar(vocabulary, StructuredOutput(json_schema=OPTIONAL), CompileLimits())
    assert grammar.completion is not None
    assert grammar.completion.symbols == '{"key5":"c","key8":"c"}'
    token_ids, matcher = [], grammar.start(grammar.completion.num_tokens)
    while not matcher.is_terminated:
        token_ids.append(matcher.accept(matcher.fallback_token_id, grammar.completion.num_tokens - len(token_ids) - 1))
    assert tokenizer.decode(token_ids) == '{"key5":"c","key8":"c"}'


def test_a_tokenizer_without_a_definition_is_refused() -> None:
    class Opaque(FastBackend):
        definition = None

    with pytest.raises(UnsupportedError, match=r"needs a tokenizer\.json"):
        Vocabulary(Tokenizer(Opaque(sentencepiece_backend())), 100, ())


# ---- the compiler -------------------------------------------------------------------------------------------


def compiler(tokenizer: Tokenizer, **limits: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids, CompileLimits(**limits))


async def test_equal_forms_are_compiled_once(tokenizer: Tokenizer) -> None:
    grammars = compiler(tokenizer, num_cached=2)
    first, again = await asyncio.gather(*(grammars.compile(StructuredOutput(regex="a+")) for _ in range(2)))
    assert first is again
    for regex in ("b+", "c+"):
        await grammars.compile(StructuredOutput(regex=regex))
    assert await grammars.compile(StructuredOutput(regex="a+")) is not first
    grammars.close()


async def test_a_slow_form_ends_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    compile_really = GrammarCompiler._compile

    def compile_slowly(self: GrammarCompiler, wanted: StructuredOutput) -> Any:
        if wanted.regex == "slow":
            assert go_on.wait(30)
        return compile_really(self, wanted)

    monkeypatch.setattr(GrammarCompiler, "_compile", compile_slowly)
    grammars = compiler(tokenizer, max_seconds=0.2)
    await grammars.compile(StructuredOutput(regex="warm"))
    slow = asyncio.ensure_future(grammars.compile(StructuredOutput(regex="slow")))
    await grammars.compile(StructuredOutput(regex="fast"))
    with pytest.raises(InvalidArgumentError, match=r"longer than 0\.2 s") as error:
        await slow
    assert error.value.context["field"] == "structured_output"
    go_on.set()
    grammars.close()


async def test_the_line_before_the_compiler_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(GrammarCompiler, "_compile", lambda self, wanted: go_on.wait(30))
    grammars = compiler(tokenizer, num_waiting=3, max_seconds=0.2)
    waiting = [asyncio.ensure_future(grammars.compile(StructuredOutput(regex=f"r{i}"))) for i in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhaustedError, match="retry later"):
        await grammars.compile(StructuredOutput(regex="one more"))
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in errors] == [InvalidArgumentError, InvalidArgumentError, ResourceExhaustedError]
    go_on.set()
    grammars.close()


async def test_a_failure_is_not_remembered(tokenizer: Tokenizer) -> None:
    grammars = compiler(tokenizer)
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match="unclosed group"):
            await grammars.compile(StructuredOutput(regex="a(b"))
    assert not grammars._grammars
    grammars.close()
