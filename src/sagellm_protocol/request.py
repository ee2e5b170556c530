"""A request: what to generate from, how, and how urgently."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, PlainSerializer, field_serializer, model_validator

from sagellm_protocol.embedding import EmbedParams
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.fields import Identifier, MaxTokens, Temperature, TokenIds, TopP
from sagellm_protocol.ids import new_request_id, new_trace_id
from sagellm_protocol.kv import KVTransferMetadata
from sagellm_protocol.messages import MAX_MESSAGES, MAX_TOOLS, ChatMessage, Tool
from sagellm_protocol.model import EdgeModel, Remedy
from sagellm_protocol.resume import ResumePoint
from sagellm_protocol.sampling import SamplingParams
from sagellm_protocol.structured import StructuredOutput

if TYPE_CHECKING:
    from typing_extensions import Self

_FLAT_SAMPLING_FIELDS = ("max_tokens", "temperature", "top_p")


class RequestPriority(IntEnum):
    """How urgent a request is; the lower number goes first, NORMAL is 0. On the wire the name in lower case."""

    CRITICAL = -2
    HIGH = -1
    NORMAL = 0
    LOW = 1
    BACKGROUND = 2


_PRIORITY_NAMES = tuple(member.name.lower() for member in RequestPriority)


def _read_priority(value: Any) -> Any:
    """Accept a priority's name in any case besides its number."""
    if not isinstance(value, str):
        return value
    if value.lower() not in _PRIORITY_NAMES:
        raise ValueError(f"priority must be one of {', '.join(_PRIORITY_NAMES)}, got {value[:40]!r}")
    return RequestPriority[value.upper()]


Priority = Annotated[
    RequestPriority,
    BeforeValidator(
        _read_priority,
        json_schema_input_type=Literal["critical", "high", "normal", "low", "background"]
        | Annotated[int, Field(ge=-2, le=2)],
    ),
    PlainSerializer(lambda priority: priority.name.lower(), return_type=str, when_used="json"),
    Remedy(f"use one of {', '.join(_PRIORITY_NAMES)}"),
]


class SLO(EdgeModel):
    """What the caller expects of the answer's timing, in milliseconds; None is no expectation."""

    ttft_ms: float | None = Field(default=None, gt=0, description="Time to the first token.")
    tpot_ms: float | None = Field(default=None, gt=0, description="Mean time between tokens after the first.")
    deadline_ms: float | None = Field(
        default=None, gt=0, description="Time to the last token, from arrival; then it is aborted."
    )


class Request(EdgeModel):
    """One generation request.

    Exactly one of ``prompt`` (a text, or token ids) and ``messages`` is given. ``max_tokens``, ``temperature`` and
    ``top_p`` are shorthands for the fields of ``sampling_params``; giving both with different values is an error.
    See :meth:`resolved_sampling`.

    Raises:
        InvalidArgumentError: naming the field and the remedy.
    """

    request_id: Identifier = Field(default_factory=new_request_id)
    trace_id: Identifier = Field(default_factory=new_trace_id)
    model: str = Field(
        default="default", min_length=1, max_length=512, description="The model's id; `default` is the engine's."
    )
    prompt: str | TokenIds | None = Field(default=None, description="A text, or token ids.")
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    prompt_token_ids: TokenIds | None = Field(
        default=None,
        description="The tokens of prompt or messages, where the sender made them with this model's tokenizer; they "
        "spare the engine the work.",
    )
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    chat_template_kwargs: dict[str, JsonValue] | None = Field(
        default=None, description="Further variables of the chat template."
    )
    max_tokens: MaxTokens | None = None
    stream: bool = False
    temperature: Temperature | None = None
    top_p: TopP | None = None
    sampling_params: SamplingParams | None = None
    structured_output: StructuredOutput | None = Field(
        default=None, description="The form that the text must have; strategies greedy and sampling."
    )
    embed: EmbedParams | None = Field(default=None, description="Make a vector of the prompt; nothing is generated.")
    kv_budget_tokens: int | None = Field(
        default=None, gt=0, description="KV cache the request may hold at most, in tokens."
    )
    metadata: dict[str, JsonValue] | None = Field(
        default=None, description="The caller's own; handed through untouched."
    )
    phase: Literal["prefill", "decode"] | None = Field(
        default=None, description="With prefill-decode separation: this half."
    )
    priority: Priority = RequestPriority.NORMAL
    slo: SLO | None = None
    tenant: Identifier | None = Field(default=None, description="Who is charged, such as the name of an API key.")
    session_id: Identifier | None = None
    cache_salt: Identifier | None = Field(
        default=None, description="Only requests with the same salt share cached prefixes."
    )
    lora: Identifier | None = Field(default=None, description="Name of the LoRA adapter to apply.")
    kv_transfer: KVTransferMetadata | None = None
    resume_from: ResumePoint | None = Field(
        default=None, description="Go on with an answer whose beginning the caller has."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt is None and self.messages is None:
            raise InvalidArgumentError(
                "prompt is required; give a text, token ids, or messages instead", field="prompt"
            )
        if self.prompt is not None and self.messages is not None:
            raise InvalidArgumentError("prompt and messages exclude each other; give only one", field="prompt")
        if self.prompt_token_ids is not None and isinstance(self.prompt, list):
            raise InvalidArgumentError(
                "prompt_token_ids are the tokens of a text or messages; prompt holds token ids already: leave them out",
                field="prompt_token_ids",
            )
        if self.embed is not None:
            self._check_embed()
        sampling = self.resolved_sampling()
        if self.resume_from is not None and sampling.seed not in (None, self.resume_from.seed):
            raise InvalidArgumentError(
                f"seed is {sampling.seed} but resume_from.seed is {self.resume_from.seed}; give the one that the "
                "request began with",
                field="resume_from.seed",
            )
        return self

    def _check_embed(self) -> None:
        given = {"structured_output": self.structured_output, "resume_from": self.resume_from}
        fields = ["stream"] * self.stream + [name for name, value in given.items() if value is not None]
        if fields:
            raise InvalidArgumentError(
                f"{fields[0]} does not go with embed, which makes a vector; leave it out", field=fields[0]
            )

    @field_serializer("sampling_params")
    def _dump_sampling(self, params: SamplingParams | None) -> dict[str, Any] | None:
        # Only what was given: defaults written out would look like the caller's wish on the other side.
        return None if params is None else params.model_dump(mode="json", exclude_unset=True)

    def resolved_sampling(self, defaults: SamplingParams | None = None) -> SamplingParams:
        """Return the request's sampling parameters: shorthands, then ``sampling_params``, then ``defaults``.

        Raises:
            InvalidArgumentError: if a shorthand and ``sampling_params`` give the same field different values, or the
                combination contradicts itself.
        """
        params = self.sampling_params or SamplingParams()
        shorthands = self._given_shorthands(params)
        if shorthands:
            params = params.replace(**shorthands)
        return params if defaults is None else params.merged_over(defaults)

    def _given_shorthands(self, params: SamplingParams) -> dict[str, Any]:
        shorthands = {}
        for name in _FLAT_SAMPLING_FIELDS:
            value = getattr(self, name)
            if value is None:
                continue
            other = getattr(params, name)
            if name in params.model_fields_set and other != value:
                raise InvalidArgumentError(
                    f"{name} is {value} but sampling_params.{name} is {other}; give only one of them", field=name
                )
            shorthands[name] = value
        return shorthands
