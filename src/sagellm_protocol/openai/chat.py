"""Types of ``POST /v1/chat/completions``."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator

from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError
from sagellm_protocol.fields import MaxTokens, NumLogprobs
from sagellm_protocol.ids import new_request_id, new_trace_id
from sagellm_protocol.messages import MAX_MESSAGES, MAX_TOOLS, ChatMessage, Tool, ToolCall, ToolName
from sagellm_protocol.model import EdgeModel, Remedy
from sagellm_protocol.openai.common import ApiModel, CompletionUsage, GenerationRequest
from sagellm_protocol.request import Request
from sagellm_protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Self


class ToolChoiceFunction(EdgeModel):
    """The function that must be called."""

    name: ToolName


class NamedToolChoice(EdgeModel):
    """A tool choice that names one function."""

    type: Literal["function"] = "function"
    function: ToolChoiceFunction


class AllowedTools(EdgeModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolsChoice(EdgeModel):
    """A tool choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatCompletionRequest(GenerationRequest):
    """The body of a chat request.

    ``max_completion_tokens`` is the newer name of ``max_tokens``; both with different values is an error.
    ``prediction`` is a hint that changes no answer. What OpenAI itself runs or has replaced (``REFUSED``) is refused.

    Raises:
        InvalidArgumentError: naming the field and the remedy.
        UnsupportedError: for what this API knows and sageLLM doesn't do.
    """

    REFUSED: ClassVar[dict[str, str]] = {
        "audio": "leave it out: answers are text",
        "function_call": "use tool_choice",
        "functions": "give them as tools",
        "moderation": "leave it out",
        "verbosity": "say it in the system message",
        "web_search_options": "leave it out and give a search of your own as a tool",
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = Field(default=None, description="Report the chosen tokens' logprobs.")
    top_logprobs: NumLogprobs | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(default=None, max_length=32)
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: list[Annotated[Literal["text"], Remedy("answers are text alone")]] | None = None
    prediction: JsonValue = None
    prompt_cache_retention: str | None = Field(default=None, max_length=64)
    prompt_cache_options: JsonValue = None
    audio: JsonValue = None
    function_call: JsonValue = None
    functions: JsonValue = None
    moderation: JsonValue = None
    web_search_options: JsonValue = None
    chat_template_kwargs: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = self.__dict__
        if not self.__pydantic_fields_set__.isdisjoint(self.REFUSED):
            self._refuse_unsupported()
        old, new = fields["max_tokens"], fields["max_completion_tokens"]
        if old is not None and new is not None and old != new:
            raise InvalidArgumentError(
                f"max_tokens is {old} but max_completion_tokens is {new}; give only max_completion_tokens",
                field="max_tokens",
            )
        if fields["top_logprobs"] is not None and not fields["logprobs"]:
            raise InvalidArgumentError(
                "top_logprobs needs logprobs; set logprobs to true or leave top_logprobs out", field="top_logprobs"
            )
        self._check_stream_options()
        self._check_tool_choice()
        _ = self._sampling, self._pattern  # what they refuse is refused here
        return self

    def _refuse_unsupported(self) -> None:
        """Raise `UnsupportedError` for what would change the answer and is not done."""
        for field, remedy in self.REFUSED.items():
            if getattr(self, field) not in (None, "medium"):  # the verbosity that every answer has
                raise UnsupportedError(f"{field} is not supported here; {remedy}", field=field)

    def _check_tool_choice(self) -> None:
        choice = self.tool_choice
        if choice in (None, "none", "auto"):
            return
        known = [tool.function.name for tool in self.tools or []]
        problem = None if known else "tool_choice needs tools; give tools or leave tool_choice out"
        if known and not isinstance(choice, str):
            named = choice.allowed_tools.tools if isinstance(choice, AllowedToolsChoice) else [choice]
            unknown = next((one.function.name for one in named if one.function.name not in known), None)
            if unknown is not None:
                problem = f"tool_choice names {unknown!r}, which is not in tools; use one of {', '.join(known)}"
        if problem is not None:
            raise InvalidArgumentError(problem, field="tool_choice")

    @property
    def usable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        tools, choice = list(self.tools or ()), self.tool_choice
        if choice == "none":
            return []
        if isinstance(choice, AllowedToolsChoice):
            allowed = {one.function.name for one in choice.allowed_tools.tools}
            return [tool for tool in tools if tool.function.name in allowed]
        return tools

    @property
    def tool_mode(self) -> Literal["none", "auto", "required"] | NamedToolChoice | None:
        """What is demanded of the answer, as for its ``usable_tools``."""
        choice = self.tool_choice
        return choice.allowed_tools.mode if isinstance(choice, AllowedToolsChoice) else choice

    @cached_property
    def _sampling(self) -> SamplingParams:
        fields = self.__dict__
        logprobs = (fields["top_logprobs"] or 0) if fields["logprobs"] else None
        max_tokens, newer = fields["max_tokens"], fields["max_completion_tokens"]
        return self._given_sampling(logprobs=logprobs, max_tokens=max_tokens if newer is None else newer)

    def to_sampling_params(self) -> SamplingParams:
        """Return the decoding parameters that the body gives, and only those as given."""
        return self._sampling

    def to_request(self, **otherwise: Any) -> Request:
        """Return the protocol's request for this body.

        ``otherwise`` are fields of it for what the body leaves open (valid ones: they aren't looked at again); without
        a ``request_id`` in either the id is fresh.
        """
        # Each has been validated as a field of this type, by the same bounds.
        pattern = self._pattern
        given = pattern.__pydantic_fields_set__
        if not given.isdisjoint(otherwise):
            otherwise = {name: value for name, value in otherwise.items() if name not in given}
        for name, make in _IDS:
            if name not in otherwise and name not in given:
                otherwise[name] = make()
        otherwise["messages"] = self.__dict__["messages"]
        return pattern.model_copy(update=otherwise)

    @cached_property
    def _pattern(self) -> Request:
        """The request without its messages: what bodies that differ in these alone have in common."""
        fields = self.__dict__
        request = self._shared_fields()
        request["tools"] = (self.usable_tools or None) if fields["tools"] else fields["tools"]
        request["chat_template_kwargs"] = fields["chat_template_kwargs"]
        request["sampling_params"] = self._sampling
        if fields["request_id"] is not None:
            request["request_id"] = fields["request_id"]
        return Request.of_valid(request)


_IDS = (("request_id", new_request_id), ("trace_id", new_trace_id))

ChatFinishReason = Literal["stop", "length", "tool_calls", "content_filter", "error", "abort"]


class ChatTopLogprob(ApiModel):
    """One candidate at a position."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatTokenLogprob(ChatTopLogprob):
    """The chosen token of a position and its most probable candidates."""

    top_logprobs: list[ChatTopLogprob] = Field(default_factory=list)


class ChatLogprobs(ApiModel):
    """Logprobs of an answer's tokens."""

    content: list[ChatTokenLogprob] | None = None
    refusal: list[ChatTokenLogprob] | None = None


class ChatAnswer(ApiModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None


class ChatChoice(ApiModel):
    """One answer of several."""

    index: int = Field(default=0, ge=0)
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | None = None


class ChatCompletion(ApiModel):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(ge=0, description="Seconds since 1970.")
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str | None = None


class FunctionCallDelta(ApiModel):
    """A piece of a function call."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(ApiModel):
    """A piece of a tool call; pieces of the same index belong together."""

    index: int = Field(default=0, ge=0)
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta | None = None


class ChatDelta(ApiModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    refusal: str | None = None


class ChatChunkChoice(ApiModel):
    """What a chunk adds to one answer."""

    index: int = Field(default=0, ge=0)
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | None = None


class ChatCompletionChunk(ApiModel):
    """One event of a streamed chat answer; the one with the usage has no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int = Field(ge=0, description="Seconds since 1970.")
    model: str
    choices: list[ChatChunkChoice] = Field(default_factory=list)
    usage: CompletionUsage | None = None
    system_fingerprint: str | None = None
