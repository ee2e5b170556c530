"""The JSON Schemas of tools' arguments, as grammars take them."""

from __future__ import annotations

from typing import Any

from sagellm_protocol import Tool

# What tells a reader something and a grammar nothing.
_NOTES = frozenset(
    ("$comment", "$schema", "default", "deprecated", "description", "examples", "readOnly", "title", "writeOnly")
)
_WITH_SCHEMAS = frozenset(("$defs", "definitions", "dependentSchemas", "patternProperties", "properties"))
_COMBINED = frozenset(("$ref", "allOf", "anyOf", "oneOf", "patternProperties"))
_TAKEN_AS_IT_IS = frozenset(("const", "enum", "required"))


def arguments_schema(tool: Tool, *, strict_only: bool = False) -> dict[str, Any]:
    """The schema of a tool's arguments, that of an object, without notes.

    A function without parameters takes none, as in OpenAI's API. Declared properties are all there are, unless the
    schema says otherwise: small models go on inventing more.
    """
    if strict_only and not tool.function.strict:
        return {"type": "object"}
    if tool.function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema: dict[str, Any] = {**_without_notes(tool.function.parameters), "type": "object"}
    if "properties" in schema and not _COMBINED & schema.keys():
        schema.setdefault("additionalProperties", False)
    return schema


def is_lenient(tool: Tool) -> bool:
    """Whether keywords that no grammar can hold to may be passed over: a strict tool's may not."""
    return not tool.function.strict


def _without_notes(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_notes(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NOTES or key == "x-guidance":
            continue
        if key in _WITH_SCHEMAS and isinstance(value, dict):
            kept[key] = {name: _without_notes(item) for name, item in value.items()}
        else:
            kept[key] = value if key in _TAKEN_AS_IT_IS else _without_notes(value)
    return kept
