"""Types of Ollama's API: `POST /api/chat`, `/api/generate`, `/api/embed`, `/api/show`, `/api/pull`.

Options of the hardware (`num_gpu`, `num_thread`, ...) are accepted and change nothing: they were settled when the model
was served. Samplers that sageLLM doesn't have are refused unless they are switched off. What clients ask for by
OpenAI's names, which Ollama passes over, is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue

from sagellm_protocol import UnsupportedError
from sagellm_protocol.embedding import Dimensions
from sagellm_protocol.fields import (
    MAX_INT32,
    MAX_SEED,
    AdditivePenalty,
    MaxTokens,
    MinP,
    NumLogprobs,
    RepetitionPenalty,
    StopStrings,
    Temperature,
    TopK,
    TopP,
)
from sagellm_protocol.messages import MAX_MESSAGES, MAX_TOOLS, Tool, ToolName
from sagellm_protocol.model import EchoedModel, EdgeModel, Remedy

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_INPUTS = 1024

_Count = Annotated[int, Field(ge=-MAX_INT32, le=MAX_INT32)]
_Number = Annotated[float, Field(ge=-1e9, le=1e9)]


class Options(EdgeModel):
    """How to generate. What is left out has the server's defaults, which need not be Ollama's."""

    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    min_p: MinP | None = None
    repeat_penalty: RepetitionPenalty | None = None
    presence_penalty: AdditivePenalty | None = None
    frequency_penalty: AdditivePenalty | None = None
    seed: int | None = Field(default=None, ge=-MAX_SEED, le=MAX_SEED, description="Below 0: a random one.")
    stop: StopStrings = ()
    num_predict: int | None = Field(
        default=None, ge=-2, le=MAX_INT32, description="Tokens to generate at most; -1 and -2: what fits."
    )
    num_ctx: int | None = Field(
        default=None, ge=1, le=MAX_INT32, description="Accepted: the context is what is served, whatever is asked for."
    )

    repeat_last_n: _Count | None = Field(default=None, description="Penalties look at all tokens: only -1.")
    mirostat: _Count | None = None
    mirostat_tau: _Number | None = None
    mirostat_eta: _Number | None = None
    tfs_z: _Number | None = None
    typical_p: _Number | None = None
    penalize_newline: bool | None = None

    num_keep: _Count | None = None
    numa: bool | None = None
    num_batch: _Count | None = None
    num_gpu: _Count | None = None
    main_gpu: _Count | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    vocab_only: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    embedding_only: bool | None = None
    num_thread: _Count | None = None

    def refuse_unsupported(self) -> None:
        """Raise `UnsupportedError` for a sampler that isn't there and isn't switched off."""
        penalties = (self.repeat_penalty or 1) != 1 or bool(self.presence_penalty) or bool(self.frequency_penalty)
        wanted = {
            "mirostat": bool(self.mirostat),
            "tfs_z": self.tfs_z not in (None, 1),
            "typical_p": self.typical_p not in (None, 1),
            "repeat_last_n": penalties and self.repeat_last_n not in (None, -1),
            "penalize_newline": penalties and self.penalize_newline is False,
        }
        refuse({f"options.{name}": value and "leave it out" for name, value in wanted.items()})


def refuse(wanted: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` for the first field that has a remedy."""
    for field, remedy in wanted.items():
        if remedy:
            raise UnsupportedError(f"{field} is not supported here; {remedy}", field=field)


def _none_if_empty(value: Any) -> Any:
    return None if value == "" else value


Format = Annotated[
    Literal["json"] | dict[str, JsonValue] | None,
    BeforeValidator(_none_if_empty, json_schema_input_type=Literal["json", ""] | dict[str, JsonValue] | None),
    Remedy("use 'json' or a JSON Schema"),
]
KeepAlive = Annotated[float, Field(ge=-1e9, le=1e9)] | Annotated[str, Field(max_length=64)]


class FunctionCall(EchoedModel):
    """The function of a call with its arguments."""

    name: ToolName
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    index: int | None = Field(default=None, ge=0, le=MAX_TOOLS)


class ToolCall(EchoedModel):
    """A call that the assistant made; what clients keep beside it (`index`) is ignored."""

    function: FunctionCall
    id: str | None = Field(default=None, min_length=1, max_length=256)
    type: Literal["function"] | None = None


Images = Annotated[list[JsonValue], Field(max_length=0), Remedy("images are not understood; leave them out")]


class Message(EchoedModel):
    """One message of the conversation; what clients keep beside it is ignored."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Images | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_name: str | None = Field(default=None, max_length=256)
    tool_call_id: str | None = Field(default=None, min_length=1, max_length=256)


class ToolChoice(EdgeModel):
    """The function that must be called."""

    type: Literal["function"]
    name: ToolName


class _Call(EdgeModel):
    """What both ways to generate share; an answer is streamed unless `stream` is false.

    `temperature`, `top_p` and `max_output_tokens` count where `options` says nothing of them.
    """

    model: str = Field(min_length=1, max_length=512)
    stream: bool | None = None
    format: Format = None
    options: Options | None = None
    keep_alive: KeepAlive | None = Field(default=None, description="Models stay; accepted.")
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_output_tokens: MaxTokens | None = None

    @property
    def is_streamed(self) -> bool:
        """Whether the answer comes in pieces."""
        return self.stream is not False

    @property
    def shows_thinking(self) -> bool:
        """Whether the answer has what the model thought."""
        return self.think is not False

    @property
    def would_unload(self) -> bool:
        """Whether `keep_alive` asks to drop the model."""
        return self.keep_alive in (0, "0", "0s", "0m", "0h")


class ChatCall(_Call):
    """The body of `/api/chat`. Without messages it only asks for the model to be loaded."""

    messages: list[Message] | None = Field(default=None, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None


class GenerateCall(_Call):
    """The body of `/api/generate`. Without a prompt it only asks for the model to be loaded."""

    prompt: str | None = None
    system: str | None = None
    suffix: str | None = None
    template: str | None = None
    context: Annotated[list[_Count], Field(fail_fast=True)] | None = None
    raw: bool | None = None
    images: Images | None = None

    def refuse_unsupported(self) -> None:
        """Raise `UnsupportedError` for what would change the prompt and is not done."""
        refuse(
            {
                "suffix": self.suffix and "put the text into the prompt",
                "template": self.template and "the model's own template is used; leave it out",
                "context": self.context and "send the conversation to /api/chat",
                "raw": self.raw and "send the prompt to /v1/completions, which uses no template",
            }
        )


class EmbedCall(EdgeModel):
    """The body of `/api/embed`. Without a text it only asks for the model to be loaded."""

    model: str = Field(min_length=1, max_length=512)
    input: str | Annotated[list[str], Field(max_length=MAX_INPUTS, fail_fast=True)] = ""
    truncate: bool | None = Field(default=None, description="Cut what is too long, as without it; false: refuse it.")
    dimensions: Dimensions | None = None
    options: Options | None = None
    keep_alive: KeepAlive | None = None


class EmbeddingsCall(EdgeModel):
    """The body of `/api/embeddings`, the older form of `/api/embed`."""

    model: str = Field(min_length=1, max_length=512)
    prompt: str = ""
    options: Options | None = None
    keep_alive: KeepAlive | None = None


class ShowCall(EdgeModel):
    """The body of `/api/show`; `name` is the older name of `model`."""

    model: str = Field(min_length=1, max_length=512)
    name: str | None = Field(default=None, max_length=512)
    verbose: bool | None = None


class PullCall(EdgeModel):
    """The body of `/api/pull`; `name` is the older name of `model`."""

    model: str = Field(min_length=1, max_length=512)
    name: str | None = Field(default=None, max_length=512)
    insecure: bool | None = None
    stream: bool | None = None
