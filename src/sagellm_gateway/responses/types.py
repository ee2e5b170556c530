"""Types of `POST /v1/responses`.

What OpenAI itself runs (web search, files, images, background work, its own stores of prompts and conversations) is not
here and refused by name; what only concerns its billing and caching is accepted and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from sagellm_protocol import InvalidArgumentError, UnsupportedError
from sagellm_protocol.fields import (
    AdditivePenalty,
    Identifier,
    LogitBias,
    MaxTokens,
    MinP,
    MinTokens,
    NumLogprobs,
    RepetitionPenalty,
    Seed,
    StopStrings,
    StopTokenIds,
    Temperature,
    TopK,
    TopP,
)
from sagellm_protocol.messages import MAX_MESSAGES, MAX_TOOLS, ToolName
from sagellm_protocol.model import EchoedModel, EdgeModel, Remedy
from sagellm_protocol.request import Priority, RequestPriority

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_PARTS = 1024

ItemId = Annotated[str, Field(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]


# ---- input items --------------------------------------------------------------------------------------


class InputText(EdgeModel):
    """Text for the model."""

    type: Literal["input_text"] = "input_text"
    text: str
    prompt_cache_breakpoint: JsonValue = None


class OutputText(EchoedModel):
    """Text that an assistant wrote, as an answer holds it; `annotations` and `logprobs` don't reach the model."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[JsonValue] = Field(default_factory=list, max_length=MAX_PARTS)
    logprobs: list[JsonValue] | None = None


class Refusal(EchoedModel):
    """An assistant's refusal, as an answer of another server may hold it."""

    type: Literal["refusal"] = "refusal"
    refusal: str


Part = Annotated[
    Annotated[InputText | OutputText | Refusal, Field(discriminator="type")],
    Remedy("only text is understood, no images, files or audio"),
]
Parts = Annotated[list[Part], Field(max_length=MAX_PARTS)]


class MessageItem(EchoedModel):
    """One message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    id: ItemId | None = None
    status: Status | None = None
    phase: str | None = Field(default=None, max_length=64)


class FunctionCallItem(EchoedModel):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: ItemId
    name: ToolName
    arguments: str
    id: ItemId | None = None
    status: Status | None = None
    caller: JsonValue = None
    namespace: str | None = Field(default=None, max_length=256)


class FunctionCallOutputItem(EchoedModel):
    """What a call brought."""

    type: Literal["function_call_output"]
    call_id: ItemId
    output: str | Annotated[list[InputText], Field(max_length=MAX_PARTS)]
    id: ItemId | None = None
    name: str | None = Field(default=None, max_length=256)
    namespace: str | None = Field(default=None, max_length=256)
    status: Status | None = None
    caller: JsonValue = None


class ReasoningText(EchoedModel):
    """A piece of reasoning, or of its summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(EchoedModel):
    """What the assistant thought; `encrypted_content` of other servers cannot be read and is left out."""

    type: Literal["reasoning"]
    id: ItemId | None = None
    summary: list[ReasoningText] = Field(default_factory=list, max_length=MAX_PARTS)
    content: list[ReasoningText] | None = Field(default=None, max_length=MAX_PARTS)
    encrypted_content: str | None = None
    status: Status | None = None


class ItemReference(EdgeModel):
    """An item of a response that is still stored, by its id."""

    type: Literal["item_reference"]
    id: ItemId


def _with_type(value: Any) -> Any:
    """Messages may leave their type out."""
    is_message = isinstance(value, dict) and value.get("type") is None and "role" in value
    return {**value, "type": "message"} if is_message else value


Item = Annotated[
    Annotated[
        MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem | ItemReference,
        Field(discriminator="type"),
    ],
    BeforeValidator(_with_type),
]


# ---- tools, text, reasoning ---------------------------------------------------------------------------


class FunctionTool(EdgeModel):
    """A function that the model may call."""

    type: Annotated[Literal["function"], Remedy("only functions of the caller's own can be called")] = "function"
    name: ToolName
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class ToolChoiceFunction(EdgeModel):
    """The function that must be called."""

    type: Literal["function"]
    name: ToolName


class AllowedTools(EdgeModel):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ToolChoiceFunction] = Field(min_length=1, max_length=MAX_TOOLS)


class TextFormat(EdgeModel):
    """The form the text must have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(default=None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "json_schema" and (self.schema_ is None or self.name is None):
            missing = "schema" if self.schema_ is None else "name"
            raise InvalidArgumentError(f"{missing} is required with type 'json_schema'; give it", field=missing)
        if self.type != "json_schema" and self.schema_ is not None:
            raise InvalidArgumentError("schema belongs to type 'json_schema'; set type to it", field="schema")
        return self


class TextConfig(EdgeModel):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(EdgeModel):
    """How much the model is to think, and whether its reasoning is told as a summary; no other one is written."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None


class ResponseStreamOptions(EdgeModel):
    """Options of a streamed response."""

    include_obfuscation: bool | None = None


# ---- the request --------------------------------------------------------------------------------------

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
    Remedy("use at most 16 texts of at most 512 characters"),
]
# All but the logprobs tell more of tools and contents that are refused by themselves.
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponsesRequest(EdgeModel):
    """The body of a request for a response.

    Raises:
        InvalidArgumentError: naming the field and the remedy.
        UnsupportedError: for what this API knows and sageLLM doesn't do.
    """

    model: str = Field(min_length=1, max_length=512)
    input: str | Annotated[list[Item], Field(max_length=MAX_MESSAGES)] = ""
    instructions: str | None = None
    previous_response_id: ItemId | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_logprobs: NumLogprobs | None = None
    tools: list[FunctionTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceFunction | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(default=None, ge=1, description="Of OpenAI's own tools; there are none here.")
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[Include] | None = Field(default=None, max_length=16)
    metadata: Metadata | None = None
    store: bool | None = None
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    conversation: JsonValue = None
    prompt: JsonValue = None
    context_management: JsonValue = None
    moderation: JsonValue = None
    service_tier: str | None = Field(default=None, max_length=64)
    safety_identifier: str | None = Field(default=None, max_length=512)
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    prompt_cache_retention: str | None = Field(default=None, max_length=64)
    prompt_cache_options: JsonValue = None
    user: str | None = Field(default=None, max_length=512)
    # Beyond OpenAI's, as chat requests have them.
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: AdditivePenalty | None = None
    frequency_penalty: AdditivePenalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: StopStrings = ()
    stop_token_ids: StopTokenIds = ()
    min_tokens: MinTokens | None = None
    ignore_eos: bool | None = None
    priority: Priority = RequestPriority.NORMAL
    cache_salt: Identifier | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the tokens' logprobs are to be told."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    @property
    def wants_summary(self) -> bool:
        """Whether the reasoning is to be told as a summary; the most detailed one is the reasoning itself."""
        return self._summary is not None

    @property
    def _summary(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.summary or self.reasoning.generate_summary

    def refuse_unsupported(self) -> None:
        """Raise `UnsupportedError` for what would change the answer and is not done."""
        wanted = {
            "truncation": self.truncation == "auto" and "set it to 'disabled' and send less",
            "background": self.background and "leave it out and stream the response",
            "conversation": self.conversation is not None and "use previous_response_id",
            "prompt": self.prompt is not None and "send the prompt's text as instructions",
            "context_management": self.context_management is not None and "leave it out",
            "moderation": self.moderation is not None and "leave it out",
            "text.verbosity": self.text and self.text.verbosity in ("low", "high") and "say it in the instructions",
            "reasoning.summary": self._summary == "concise" and "ask for 'auto', which is the whole reasoning",
            "stream_options.include_obfuscation": self.stream_options
            and self.stream_options.include_obfuscation
            and "leave it out",
        }
        for field, remedy in wanted.items():
            if remedy:
                raise UnsupportedError(f"{field} is not supported here; {remedy}", field=field)
