"""Types of `POST /v1/messages` and `/v1/messages/count_tokens`.

`cache_control`, `service_tier` and `metadata` are accepted and change nothing: prefixes are always cached. Tools that
Anthropic itself runs, images and documents are refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from sagellm_protocol import InvalidArgumentError, UnsupportedError
from sagellm_protocol.fields import MaxTokens, StopStrings, TopK, TopP
from sagellm_protocol.messages import MAX_MESSAGES, MAX_TOOLS, ToolName
from sagellm_protocol.model import EdgeModel, Remedy

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_BLOCKS = 4096

BlockId = Annotated[str, Field(min_length=1, max_length=256)]


class CacheControl(EdgeModel):
    """Where a prefix may be cached; it always is."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


# ---- content ------------------------------------------------------------------------------------------


class _Block(EdgeModel):
    """What every block may carry."""

    cache_control: CacheControl | None = None


class TextBlock(_Block):
    """Text; `citations` of an earlier answer don't reach the model."""

    type: Literal["text"] = "text"
    text: str
    citations: list[JsonValue] | None = Field(default=None, max_length=MAX_BLOCKS)


class ThinkingBlock(EdgeModel):
    """What the assistant thought; the signature is opaque and not looked at."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(EdgeModel):
    """Thinking that only another server can read; it is left out."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(_Block):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: BlockId
    name: ToolName
    input: dict[str, JsonValue]
    caller: JsonValue = None
    toolset_name: str | None = Field(default=None, max_length=256)


Texts = str | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS)]


class ToolResultBlock(_Block):
    """What a call brought."""

    type: Literal["tool_result"]
    tool_use_id: BlockId
    content: Annotated[Texts, Remedy("only text is understood, no images or documents")] = ""
    is_error: bool = False
    toolset_name: str | None = Field(default=None, max_length=256)


Block = Annotated[
    Annotated[
        TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
        Field(discriminator="type"),
    ],
    Remedy("only text, thinking, tool_use and tool_result are understood, no images or documents"),
]


class Message(EdgeModel):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=MAX_BLOCKS)]

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        allowed = _BLOCKS_OF_ROLE[self.role]
        for index, block in enumerate(self.content if isinstance(self.content, list) else ()):
            if block.type not in allowed:
                raise InvalidArgumentError(
                    f"content[{index}].type must be one of {', '.join(allowed)} in a message of role "
                    f"{self.role!r}, got {block.type!r}; move the block",
                    field=f"content[{index}].type",
                )
        return self


_BLOCKS_OF_ROLE = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}


# ---- tools and options --------------------------------------------------------------------------------


def _is_custom(value: Any) -> Any:
    """A tool of the caller's own may leave its type out, or null."""
    return "custom" if value is None else value


class ToolDefinition(_Block):
    """A tool of the caller's own. Examples belong into the description here."""

    type: Annotated[
        Literal["custom"],
        BeforeValidator(_is_custom, json_schema_input_type=Literal["custom"] | None),
        Remedy("tools that Anthropic runs are not available; describe your own with input_schema"),
    ] = "custom"
    name: ToolName
    description: str | None = None
    input_schema: dict[str, JsonValue]
    strict: bool | None = None
    eager_input_streaming: bool | None = None


class ToolChoice(EdgeModel):
    """Whether and which tool is to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise InvalidArgumentError("name belongs to type 'tool'; give both or neither", field="name")
        return self


class Thinking(EdgeModel):
    """Whether the model is to think and show it. There is no budget of its own: thinking counts in `max_tokens`."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(default=None, ge=1024)
    display: Literal["summarized", "omitted"] | None = None

    @property
    def is_on(self) -> bool:
        """Whether to think."""
        return self.type != "disabled"

    @property
    def is_shown(self) -> bool:
        """Whether the answer shows it."""
        return self.is_on and self.display != "omitted"


class OutputFormat(EdgeModel):
    """The schema of the answer's text."""

    type: Literal["json_schema"]
    schema_: dict[str, JsonValue] = Field(alias="schema")


class OutputConfig(EdgeModel):
    """How the answer is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ContextEdit(EdgeModel):
    """What to leave out of a long conversation: earlier thinking, which chat templates leave out by themselves."""

    type: Annotated[Literal["clear_thinking_20251015"], Remedy("leave out of the messages what is not needed")]
    keep: JsonValue = None


class ContextManagement(EdgeModel):
    """How to shorten a long conversation."""

    edits: list[ContextEdit] = Field(default_factory=list, max_length=16)


class CallerMetadata(EdgeModel):
    """Whom the request is for; handed through."""

    user_id: str | None = Field(default=None, max_length=512)


# ---- requests -----------------------------------------------------------------------------------------


class _Prompt(EdgeModel):
    """What makes up the prompt, in both calls."""

    model: str = Field(min_length=1, max_length=512)
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Texts | None = None
    tools: list[ToolDefinition] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(default=None, description="The older name of `output_config.format`.")
    cache_control: CacheControl | None = None
    context_management: ContextManagement | None = None
    speed: Literal["standard"] | None = None


class MessagesRequest(_Prompt):
    """The body of a request for a message.

    Raises:
        InvalidArgumentError: naming the field and the remedy.
    """

    max_tokens: MaxTokens
    stop_sequences: StopStrings = ()
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: TopP | None = None
    top_k: TopK | None = None
    metadata: CallerMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    thread: JsonValue = None

    def refuse_unsupported(self) -> None:
        """Raise `UnsupportedError` for a conversation that the server is to keep; by its code clients send it whole."""
        if self.thread is not None:
            raise UnsupportedError(
                "thread is not supported here; send the whole conversation without it",
                field="thread",
                error_code="thread_unsupported_request",
            )


class CountTokensRequest(_Prompt):
    """The body of a request for the number of a prompt's tokens."""
