"""From the protocol's `StructuredOutput` to a grammar in llguidance's own notation, within limits.

What a form may cost is bounded here by its size and depth; what its compilation and each step may cost, by
`parser_limits`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import gbnf_to_lark

from sagellm_protocol import InvalidArgumentError, StructuredOutput

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# A JSON document stands on one line, with a blank behind commas and colons or without: what most models write of
# themselves. Where any white space may stand, small models go on with it for ever.
_JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
}
_EMBEDDED_SCHEMA = re.compile(r"%json\s*(?=\{)")
_QUOTED = re.compile(r'"((?:[^"\\\n]|\\.)*)"|/((?:[^/\\\n]|\\.)+)/')
_MAX_LITERALS = 64
_MAX_LITERAL_CHARS = 64


class GrammarSource(NamedTuple):
    """A grammar as llguidance reads it, and fixed strings in it, which a search for completions tries as a whole."""

    text: str
    literals: tuple[str, ...]


def grammar_source(wanted: StructuredOutput, *, max_bytes: int, max_depth: int) -> GrammarSource:
    """The grammar for `wanted`.

    Raises:
        InvalidArgumentError: it is larger or nested deeper than allowed, or not a grammar at all.
    """
    if wanted.json_object:
        return _json_source({"type": "object"})
    if wanted.json_schema is not None:
        _check_size(len(json.dumps(wanted.json_schema, ensure_ascii=False).encode()), max_bytes)
        if _depth(wanted.json_schema) > max_depth:
            raise _refusal(f"json_schema is nested deeper than {max_depth} levels; flatten it, or use $ref")
        return _json_source(wanted.json_schema)
    if wanted.choice is not None:
        _check_size(sum(len(text.encode()) for text in wanted.choice), max_bytes)
        alternatives = " | ".join(_lark_string(text) for text in dict.fromkeys(wanted.choice))
        return GrammarSource(LLMatcher.grammar_from_lark(f"start: {alternatives}"), ())
    if wanted.regex is not None:
        _check_size(len(wanted.regex.encode()), max_bytes)
        return GrammarSource(LLMatcher.grammar_from_regex(wanted.regex), _literals(wanted.regex))
    grammar = wanted.grammar or ""
    _check_size(len(grammar.encode()), max_bytes)
    if "::=" in grammar:  # the notation of llama.cpp, which other engines' users know
        try:
            grammar = gbnf_to_lark(grammar)
        except Exception as error:
            raise _refusal(f"grammar cannot be read: {_first_line(error)}; write it in Lark's notation") from error
    text = LLMatcher.grammar_from_lark(_replace_schemas(grammar, _with_json_options))
    return GrammarSource(text, _quoted_literals(_replace_schemas(grammar, lambda schema: "{}")))


def parser_limits() -> LLParserLimits:
    """What a grammar may cost: about 50 ms of lexer at the start and 10 ms a step, and 50 MB of lexer states."""
    return LLParserLimits(
        initial_lexer_fuel=2_000_000,
        step_lexer_fuel=150_000,
        step_max_items=50_000,
        max_lexer_states=40_000,
        max_grammar_size=300_000,
        verbose_errors=False,
    )


def cannot_compile(problem: str) -> InvalidArgumentError:
    """The error for a form that llguidance refuses, in its words."""
    return _refusal(f"it cannot be compiled: {' '.join(problem.split())[:400]}; change or simplify it")


def _json_source(schema: dict[str, Any]) -> GrammarSource:
    text = LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    return GrammarSource(text, tuple(dict.fromkeys(literal for p in _patterns(schema) for literal in _literals(p))))


def _patterns(node: Any) -> Iterator[str]:
    """All values of `pattern` in a schema, wherever they stand."""
    if isinstance(node, dict):
        if isinstance(node.get("pattern"), str):
            yield node["pattern"]
        for child in node.values():
            yield from _patterns(child)
    elif isinstance(node, list):
        for child in node:
            yield from _patterns(child)


def _with_json_options(schema: dict[str, Any]) -> str:
    """A schema within a grammar, with `_JSON_OPTIONS` if it has no such options of its own."""
    return json.dumps({"x-guidance": _JSON_OPTIONS, **schema}, ensure_ascii=False)


def _replace_schemas(grammar: str, text_of: Callable[[dict[str, Any]], str]) -> str:
    """The grammar with each JSON Schema in it written anew."""
    parts, done = [], 0
    for match in _EMBEDDED_SCHEMA.finditer(grammar):
        if match.start() < done:
            continue  # inside of the last one
        try:
            schema, end = json.JSONDecoder().raw_decode(grammar, match.end())
        except ValueError:
            break  # the library says what is wrong
        parts += [grammar[done : match.end()], text_of(schema)]
        done = end
    return "".join([*parts, grammar[done:]])


def _quoted_literals(grammar: str) -> tuple[str, ...]:
    """The strings of a grammar, and the literals of its regular expressions."""
    found: dict[str, None] = {}
    for text, regex in _QUOTED.findall(grammar):
        if text and len(text) <= _MAX_LITERAL_CHARS:
            try:
                found[json.loads(f'"{text}"')] = None
            except ValueError:
                continue
        found.update(dict.fromkeys(_literals(regex)))
    return tuple(found)[:_MAX_LITERALS]


def _literals(source: str) -> tuple[str, ...]:
    """Runs of plain characters in a regular expression or grammar: some of them are texts that it demands."""
    plain = re.sub(r"\\([^A-Za-z0-9])", r"\1", re.sub(r"\[[^\]]*\]", " ", source))
    runs = dict.fromkeys(run for run in re.findall(r"[\w</>=:|-]{2,}", plain) if len(run) <= _MAX_LITERAL_CHARS)
    return tuple(runs)[:_MAX_LITERALS]


def _depth(value: Any) -> int:
    deepest, stack = 0, [(value, 1)]
    while stack:
        node, depth = stack.pop()
        deepest = max(deepest, depth)
        if isinstance(node, (dict, list)):
            stack += [(child, depth + 1) for child in (node.values() if isinstance(node, dict) else node)]
    return deepest


def _lark_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise _refusal(f"it has {num_bytes} bytes, at most {max_bytes} are taken; shorten it")


def _refusal(problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"structured_output: {problem}", field="structured_output")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
