"""Types of ``POST /v1/embeddings``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sagellm_protocol.model import EdgeModel
from sagellm_protocol.openai.common import ApiModel, CompletionUsage
from sagellm_protocol.openai.completions import Prompts, split_prompts


class EmbeddingRequest(EdgeModel):
    """The body of an embedding request: one or several inputs, as text or token ids."""

    model: str = Field(min_length=1, max_length=512)
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        default=None, ge=1, description="Cut the vectors to this length, where the model allows it."
    )
    user: str | None = Field(default=None, max_length=512)

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs, one by one."""
        return split_prompts(self.input)


class EmbeddingItem(ApiModel):
    """One vector: numbers, or (base64) the text of its little-endian float32 bytes."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(default=0, ge=0)
    embedding: list[float] | str


class EmbeddingResponse(ApiModel):
    """The answer to an embedding request, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: CompletionUsage = Field(default_factory=CompletionUsage)
