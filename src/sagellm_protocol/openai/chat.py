"""Types of ``POST /v1/chat/completions``."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, JsonValue, model_validator

from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.fields import MaxTokens, NumLogprobs
from sagellm_protocol.messages import MAX_MESSAGES, MAX_TOOLS, ChatMessage, Tool, ToolCall, ToolName
from sagellm_protocol.model import EdgeModel
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


class ChatCompletionRequest(GenerationRequest):
    """The body of a chat request.

    ``max_completion_tokens`` is the newer name of ``max_tokens``; both with different values is an error.

    Raises:
        InvalidArgumentError: naming the field and the remedy.
    """

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = Field(default=None, description="Report the chosen tokens' logprobs.")
    top_logprobs: NumLogprobs | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(default=None, max_length=32)
    chat_template_kwargs: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = self.__dict__
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
        _ = self._sampling
        self.to_structured_output()
        return self

    def _check_tool_choice(self) -> None:
        if self.tool_choice in (None, "none", "auto"):
            return
        names = [tool.function.name for tool in self.tools or []]
        problem = None if names else "tool_choice needs tools; give tools or leave tool_choice out"
        if names and isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            wanted = self.tool_choice.function.name
            problem = f"tool_choice names {wanted!r}, which is not in tools; use one of {', '.join(names)}"
        if problem is not None:
            raise InvalidArgumentError(problem, field="tool_choice")

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
        fields = self.__dict__
        request = otherwise | self._shared_fields()
        request["messages"] = fields["messages"]
        request["tools"] = None if fields["tool_choice"] == "none" else fields["tools"]
        request["chat_template_kwargs"] = fields["chat_template_kwargs"]
        request["sampling_params"] = self._sampling
        if fields["request_id"] is not None:
            request["request_id"] = fields["request_id"]
        # Each has been validated as a field of this type, by the same bounds.
        return Request.of_valid(request)


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
