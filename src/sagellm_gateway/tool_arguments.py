"""Arguments of tool calls as objects, for APIs that don't hand them on as the text that the model wrote."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

# What a text that is no object is called, so that the caller can show the model its mistake.
INVALID_JSON = "INVALID_JSON"


def arguments_object(text: str) -> dict[str, Any]:
    """The object in `text`; of one that was cut off (by `max_tokens`) what is there, of anything else the text itself.

    >>> arguments_object('{"city": "Par')
    {'city': 'Par'}
    >>> arguments_object("Paris")
    {'INVALID_JSON': 'Paris'}
    """
    if not text.strip():
        return {}
    try:
        value = from_json(text, allow_partial="trailing-strings")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {INVALID_JSON: text}
