"""Chat messages and tools, in the shape of the OpenAI API; used by Request and by the OpenAI types alike."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.model import EchoedModel, EdgeModel, Remedy

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_TOOL_NAME = 128  # Anthropic's limit; OpenAI's is 64
MAX_PARTS = 1024

Role = Literal["system", "developer", "user", "assistant", "tool"]
ToolName = Annotated[
    str,
    Field(pattern=rf"^[a-zA-Z0-9_.-]{{1,{MAX_TOOL_NAME}}}$"),
    Remedy(f"use 1 to {MAX_TOOL_NAME} letters, digits, underscores, dots or dashes"),
]


class TextPart(EchoedModel):
    """One text piece of a message's content; other kinds of content (images, audio) aren't understood.

    Of an answer that is sent back it may keep more (``annotations``), which doesn't reach the model.
    """

    type: Annotated[Literal["text"], Remedy("only text content is supported")] = "text"
    text: str


class FunctionCall(EchoedModel):
    """The function that a tool call names, with its arguments as a JSON text (as the model wrote them)."""

    name: ToolName
    arguments: str = "{}"


class ToolCall(EchoedModel):
    """A call of a tool that the assistant asks for."""

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(EchoedModel):
    """One message of a conversation, as a client sends it and as an assistant's answer is kept.

    Clients send an answer back as they got it: fields beside these (``refusal``, ``annotations``, ``parsed``, ...) are
    ignored, they don't reach the model.
    """

    role: Role
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(default=None, max_length=256)
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        fields = self.__dict__  # every attribute costs about as much as this, and each message of each call comes by
        role, has_calls = fields["role"], bool(fields["tool_calls"])
        if fields["content"] is None and not has_calls and role != "assistant":
            raise InvalidArgumentError(
                f"content is required in a message of role {role!r}; give a text", field="content"
            )
        if has_calls and role != "assistant":
            raise InvalidArgumentError(
                f"tool_calls belong to role 'assistant', got role {role!r}; remove them", field="tool_calls"
            )
        if role == "tool" and fields["tool_call_id"] is None:
            raise InvalidArgumentError(
                "tool_call_id is required in a message of role 'tool'; give the id of the call it answers",
                field="tool_call_id",
            )
        return self

    @property
    def text(self) -> str:
        """The content as one text: parts joined, nothing if there is none."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def to_template(self) -> dict[str, Any]:
        """Return what chat templates expect: ``role``, ``content`` as text, and what else the message has."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        for name in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(self, name)
            if value is not None:
                message[name] = value
        return message


class FunctionDefinition(EdgeModel):
    """A function that the model may call; ``parameters`` is a JSON Schema."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(EdgeModel):
    """A tool that the model may use."""

    type: Literal["function"] = "function"
    function: FunctionDefinition
