"""Structured output: the form that a request's text must have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, JsonValue, model_validator

from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.model import EdgeModel

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_CHOICES = 1024
MAX_GRAMMAR_CHARS = 262_144

_KINDS = ("json_object", "json_schema", "regex", "choice", "grammar")


class StructuredOutput(EdgeModel):
    """Exactly one of these forms; the answer is complete and valid within its tokens wherever the form allows it.

    Raises:
        InvalidArgumentError: naming the field and the remedy.
    """

    json_object: bool = Field(default=False, description="Any JSON object.")
    json_schema: dict[str, JsonValue] | None = Field(default=None, description="A JSON document of this schema.")
    regex: str | None = Field(default=None, max_length=MAX_GRAMMAR_CHARS, description="A text that this matches whole.")
    choice: list[Annotated[str, Field(min_length=1, max_length=4096)]] | None = Field(
        default=None, min_length=1, max_length=MAX_CHOICES, description="One of these texts."
    )
    grammar: str | None = Field(
        default=None, max_length=MAX_GRAMMAR_CHARS, description="A text of this grammar, in Lark's notation."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [kind for kind in _KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            raise InvalidArgumentError(
                f"structured output takes exactly one of {', '.join(_KINDS)}, got {', '.join(given) or 'none'}",
                field=given[0] if given else "structured_output",
            )
        return self
