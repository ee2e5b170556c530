"""What a served model is, and the question how it splits a text into tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, JsonValue, model_validator

from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.messages import MAX_MESSAGES, MAX_TOOLS, ChatMessage, Tool
from sagellm_protocol.model import EdgeModel, ProtocolModel

if TYPE_CHECKING:
    from typing_extensions import Self


class ModelDescription(ProtocolModel):
    """A model as an engine serves it.

    `special_tokens` maps names such as `bos_token` and `eos_token` to their text. An embedding model (`is_embedding`)
    makes vectors of texts and no text.
    """

    model: str = Field(description="The name that requests ask for it by.")
    architecture: str = ""
    num_parameters: int = Field(default=0, ge=0, description="In matrices, tied embeddings counted once.")
    vocab_size: int = Field(ge=1, description="Token ids that the model has rows for.")
    hidden_size: int = Field(ge=1, description="Numbers in a token's hidden state, and in an embedding.")
    max_model_len: int = Field(ge=1, description="Tokens of prompt and output together.")
    is_embedding: bool = False
    dtype: str = ""
    quantization: str = "none"
    device: str = ""
    weight_bytes: int = Field(default=0, ge=0)
    chat_template: str | None = Field(default=None, description="In jinja2: the one for conversations with tools.")
    special_tokens: dict[str, str] = Field(default_factory=dict)


class TokenizeRequest(EdgeModel):
    """A text, or a conversation as the chat template writes it, to be split into tokens.

    `add_special_tokens` puts the model's own tokens around a text (a template writes its own),
    `add_generation_prompt` opens the answer's turn after a conversation.

    Raises:
        InvalidArgumentError: naming the field and the remedy.
    """

    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    chat_template_kwargs: dict[str, JsonValue] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidArgumentError("give either prompt or messages, and not both", field="prompt")
        return self
