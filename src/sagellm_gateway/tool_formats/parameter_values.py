"""Values that a model writes without quotes: what they are, by their schema."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import from_json

_MAX_REFS = 8
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def property_schema(schema: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The schema of an object's property, its reference followed; an empty one where there is none."""
    properties = schema.get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    return _resolved(found, schema)


def is_text(schema: Mapping[str, Any], name: str) -> bool:
    """Whether an object's property can be nothing but a string."""
    return set(_types(property_schema(schema, name), schema, _MAX_REFS)) == {"string"}


def json_text(raw: str, schema: Mapping[str, Any], name: str) -> str:
    """The JSON of the value `raw` of a property: as it stands where it is JSON of an allowed type, else a string.

    >>> [json_text(raw, {"properties": {"n": {"type": ["integer", "string"]}}}, "n") for raw in ("5", "five")]
    ['5', '"five"']
    """
    types = set(_types(property_schema(schema, name), schema, _MAX_REFS))
    text = raw.strip()
    try:
        value = from_json(text, allow_inf_nan=False)
        return text if "string" not in types or _is_of(value, types) else json.dumps(raw, ensure_ascii=False)
    except ValueError:
        pass
    try:  # Python's spelling, which the template itself shows the model: True, None, ['a']
        value = ast.literal_eval(text)
        if not isinstance(value, str) and _is_of(value, types):
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    return json.dumps(raw, ensure_ascii=False)


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    for _ in range(_MAX_REFS):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not (isinstance(reference, str) and reference.startswith("#/")):
            return schema
        schema = root
        for step in reference[2:].split("/"):
            schema = schema.get(step) if isinstance(schema, Mapping) else None
    return {}


def _types(schema: Any, root: Mapping[str, Any], num_refs: int) -> Iterator[str]:
    """The types that a schema allows; none where it names none."""
    schema = _resolved(schema, root)
    kinds = schema.get("type")
    if kinds is None:
        yield from (name for value in values_of(schema) for name, types in _TYPES.items() if type(value) in types)
    else:
        yield from (name for name in _TYPES if name == kinds or (isinstance(kinds, list) and name in kinds))
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        for choice in choices if isinstance(choices, list) and num_refs else ():
            yield from _types(choice, root, num_refs - 1)


def values_of(schema: Mapping[str, Any]) -> Sequence[Any]:
    """The values that a schema counts up; none if it does not."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else []


def _is_of(value: Any, types: set[str]) -> bool:
    allowed = {kind for name in types for kind in _TYPES.get(name, ())}
    return not allowed or type(value) in allowed
