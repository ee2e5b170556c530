"""What a request says that wants a vector of its prompt, not an answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sagellm_protocol.model import EdgeModel, Remedy

MAX_DIMENSIONS = 65_536

Dimensions = Annotated[
    int,
    Field(ge=1, le=MAX_DIMENSIONS, description="Cut the vector to this length, as for models trained so (Matryoshka)."),
    Remedy("leave it out for the model's own length"),
]
TruncatePromptTokens = Annotated[
    int,
    Field(ge=-1, le=2**31 - 1, description="Cut a longer prompt to so many tokens instead of refusing it."),
    Remedy("use -1 for what the model takes"),
]


class EmbedParams(EdgeModel):
    """How the vector is made. Its pooling and whether it has length 1 are the model's own."""

    dimensions: Dimensions | None = None
    truncate_prompt_tokens: TruncatePromptTokens | None = None
