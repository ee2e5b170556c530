"""Values without quotes become what their schema says; no schema of a client breaks a parser or a grammar's writer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_gateway.tool_formats import FORMATS, ToolFormat
from sagellm_gateway.tool_formats.parameter_values import is_text, json_text
from sagellm_protocol import InvalidArgumentError, Tool

DEFINITIONS = {"Color": {"enum": ["red", "5"]}, "Loop": {"$ref": "#/$defs/Loop"}, "Num": {"type": "number"}}


@pytest.mark.parametrize(
    ("schema", "raw", "value"),
    [
        ({"type": "integer"}, " 5\n", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": ["integer", "string"]}, "5", 5),
        ({"type": ["boolean", "string"]}, "5", "5"),
        ({"type": "boolean"}, "True", True),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "None", None),
        ({"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Num"}]}, "1.5", 1.5),
        ({"type": "array"}, "['a', 1]", ["a", 1]),
        ({"type": "object"}, "{'a': {'b': None}}", {"a": {"b": None}}),
        ({"type": "object"}, "{'a'", "{'a'"),
        ({"enum": [1, "x"]}, "x", "x"),
        ({"$ref": "#/$defs/Color"}, "5", "5"),
        ({"$ref": "#/$defs/Loop"}, "[1]", [1]),
        ({}, "NaN", "NaN"),
        (True, "x", "x"),
        ({"type": "number"}, "(" * 9999, "(" * 9999),
    ],
)
def test_values(schema: Any, raw: str, value: Any) -> None:
    root = {"properties": {"a": schema}, "$defs": DEFINITIONS}
    if is_text(root, "a"):
        assert raw == value
    else:
        assert json.loads(json_text(raw, root, "a")) == value


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["string", "object", "#/$defs/a", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "properties", "required", "enum", "const", "anyOf", "$ref", "$defs", "a"]), inner
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("form", FORMATS)
@given(parameters=st.dictionaries(st.sampled_from(["type", "properties", "required", "anyOf", "$ref", "$defs"]), JSON))
def test_odd_schemas_are_refused_at_worst(form: type[ToolFormat], parameters: dict[str, Any]) -> None:
    function = {"name": "f", "parameters": parameters}
    tools = [Tool.model_validate({"type": "function", "function": {**function, "strict": s}}) for s in (True, False)]
    try:
        form().grammar(tools, only=None, parallel=True)
        form().lazy_grammar(tools, parallel=True)
    except InvalidArgumentError:
        pass
    parser = form().parser(0, tools)
    parser.feed("<tool_call>\n<function=f>\n<parameter=a>\n[1]\n</parameter>\n</function>\n</tool_call>")
    parser.end()
