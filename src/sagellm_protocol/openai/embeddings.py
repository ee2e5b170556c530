"""Types of ``POST /v1/embeddings``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sagellm_protocol.embedding import Dimensions, TruncatePromptTokens
from sagellm_protocol.fields import TokenIds
from sagellm_protocol.model import EdgeModel
from sagellm_protocol.openai.common import ApiModel
from sagellm_protocol.openai.completions import split_prompts

MAX_INPUTS = 2048

Inputs = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
)


class EmbeddingRequest(EdgeModel):
    """The body of an embedding request: one or several inputs, as text or token ids.

    ``user`` changes nothing. ``truncate_prompt_tokens`` is vLLM's: without it an input that is too long is refused.
    """

    model: str = Field(min_length=1, max_length=512)
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Dimensions | None = None
    user: str | None = Field(default=None, max_length=512)
    truncate_prompt_tokens: TruncatePromptTokens | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs, one by one."""
        return split_prompts(self.input)


class EmbeddingItem(ApiModel):
    """One vector: numbers, or (base64) the text of its little-endian float32 bytes."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(default=0, ge=0)
    embedding: list[float] | str


class EmbeddingUsage(ApiModel):
    """Tokens of all inputs together; nothing is generated."""

    prompt_tokens: int = Field(default=0, ge=0)
    total_tokens: int = Field(default=0, ge=0)


class EmbeddingResponse(ApiModel):
    """The answer to an embedding request, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage = Field(default_factory=EmbeddingUsage)
