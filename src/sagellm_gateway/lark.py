"""Parts of grammars in llguidance's Lark notation, for models whose marks may be tokens of their own.

A mark such as `<tool_call>` is one token of most models that write it. A grammar must name that token: spelled out, the
mark would be other tokens, which the model has never seen in its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sagellm_protocol import InvalidArgumentError, StructuredOutput

# The form in which templates print JSON, so the one that models have learned.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def lark_string(text: str) -> str:
    """A fixed text."""
    return json.dumps(text, ensure_ascii=False)


def lark_regex(text: str) -> str:
    """A fixed text within a regular expression between slashes."""
    return "".join(f"\\{char}" if char in r"\/.^$*+?()[]{}|" else char for char in text).replace("\n", "\\n")


def lark_json(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """A JSON document of a schema. If `lenient`, keywords that no grammar can hold to are passed over."""
    options = {**_JSON_OPTIONS, "lenient": True} if lenient else _JSON_OPTIONS
    return f"%json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}"


def lark_mark(mark: str, token_ids: Mapping[str, int]) -> str:
    """A mark: the model's token for it, or its text."""
    return f"<[{token_ids[mark]}]>" if mark in token_ids else lark_string(mark)


def lark_form(form: StructuredOutput) -> str:
    """A form as the right side of a rule; raises `InvalidArgumentError` if it is no grammar."""
    if form.json_object:
        return lark_json({"type": "object"})
    if form.json_schema is not None:
        return lark_json(form.json_schema)
    if form.choice is not None:
        return " | ".join(lark_string(text) for text in form.choice)
    if form.regex is not None:
        return f"/{_with_slashes_escaped(form.regex)}/"
    return f"%lark {{\n{_in_lark(form.grammar or '')}\n}}"


def text_until(name: str, mark: str, token_ids: Mapping[str, int]) -> str:
    """The rule `name` for any text up to the first `mark`, and the mark itself."""
    if mark in token_ids:  # which no text between tokens can hold
        return f"{name}: /(?s:.+)/? {lark_mark(mark, token_ids)}"
    return f"{name}[lazy]: /(?s:.*){lark_regex(mark)}/"


def grammar_of(rules: list[str], *, field: str) -> StructuredOutput:
    """The grammar of `rules`; one that is too large is blamed on `field`."""
    try:
        return StructuredOutput(grammar="\n".join([*rules, ""]))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"the grammar that {field} ask for is too large: {error}", field=field) from error


def _with_slashes_escaped(regex: str) -> str:
    escaped, is_escaped = [], False
    for char in regex:
        escaped.append("\\/" if char == "/" and not is_escaped else char)
        is_escaped = char == "\\" and not is_escaped
    return "".join(escaped)


def _in_lark(grammar: str) -> str:
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(grammar))
    except Exception as error:  # whatever the converter stumbles over
        raise InvalidArgumentError(
            f"grammar cannot be read: {error}; write it in Lark's notation", field="structured_output"
        ) from error
