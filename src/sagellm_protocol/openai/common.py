"""What the endpoints of the OpenAI API share: sampling fields, usage, model list, error body."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import from_json

from sagellm_protocol.errors import ErrorCode, InvalidArgumentError, SageLLMError
from sagellm_protocol.fields import (
    AdditivePenalty,
    Identifier,
    LengthPenalty,
    LogitBias,
    MaxTokens,
    MinP,
    MinTokens,
    NumBeams,
    NumOutputs,
    PenaltyAlpha,
    RepetitionPenalty,
    Seed,
    StopStrings,
    StopTokenIds,
    Temperature,
    TopK,
    TopP,
)
from sagellm_protocol.model import EdgeModel, ProtocolModel
from sagellm_protocol.request import Priority, RequestPriority
from sagellm_protocol.response import Usage
from sagellm_protocol.sampling import DecodingStrategy, SamplingParams
from sagellm_protocol.structured import StructuredOutput

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_PROMPTS = 1024
MAX_SCHEMA_CHARS = 262_144


class ApiModel(ProtocolModel):
    """An answer of the API. Fields it doesn't know are ignored, so that clients read newer servers too."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(EdgeModel):
    """Options of a streamed answer."""

    include_usage: bool = Field(default=False, description="Send a last chunk with the usage and no choices.")
    continuous_usage_stats: bool = Field(
        default=False, description="With include_usage: every chunk has the usage so far, of all choices together."
    )
    include_obfuscation: bool | None = None

    @property
    def counts_usage(self) -> bool:
        """Whether every chunk is to have the usage so far."""
        return self.include_usage and self.continuous_usage_stats


class JsonSchemaFormat(EdgeModel):
    """A named JSON Schema; ``strict`` and ``description`` change nothing: a schema is always kept to."""

    name: str | None = Field(default=None, max_length=256)
    description: str | None = None
    json_schema: dict[str, JsonValue] = Field(alias="schema", description="The JSON Schema.")
    strict: bool | None = None


class ResponseFormat(EdgeModel):
    """The form the answer must have; ``json_schema`` belongs to type "json_schema"."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidArgumentError(
                "json_schema belongs to type 'json_schema'; give both or neither", field="json_schema"
            )
        return self


def _read_schema(value: Any) -> Any:
    """Read a schema that comes as a text, within bounds: a text hides its structure from those of the body."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_SCHEMA_CHARS:
        raise ValueError(f"a JSON Schema must have at most {MAX_SCHEMA_CHARS} characters, got {len(value)}")
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"the JSON Schema is not valid JSON: {error}") from None


JsonSchemaText = Annotated[
    dict[str, JsonValue],
    BeforeValidator(_read_schema, json_schema_input_type=dict[str, JsonValue] | str),
    Field(description="A JSON Schema, or a text that holds one."),
]


class StructuredOutputs(EdgeModel):
    """The form the answer must have, by vLLM's names."""

    json_schema: JsonSchemaText | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class GenerationRequest(EdgeModel):
    """The fields that chat and completion requests share; those after ``user`` are sageLLM's extensions.

    A field left out or null takes the engine's default. ``user``, ``store``, ``service_tier``, ``safety_identifier``
    and ``prompt_cache_key`` are accepted and don't change the answer.
    """

    model: str = Field(min_length=1, max_length=512)
    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: NumOutputs | None = None
    stop: StopStrings = ()
    presence_penalty: AdditivePenalty | None = None
    frequency_penalty: AdditivePenalty | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    metadata: dict[str, JsonValue] | None = Field(default=None, max_length=64)
    store: bool | None = None
    service_tier: str | None = Field(default=None, max_length=64)
    safety_identifier: str | None = Field(default=None, max_length=512)
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    user: str | None = Field(default=None, max_length=512)
    response_format: ResponseFormat | None = None

    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchemaText | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = Field(default=None, max_length=64, description="Changes nothing.")
    strategy: DecodingStrategy | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    length_penalty: LengthPenalty | None = None
    num_beams: NumBeams | None = None
    early_stopping: bool | Literal["never"] | None = None
    penalty_alpha: PenaltyAlpha | None = None
    min_tokens: MinTokens | None = None
    stop_token_ids: StopTokenIds = ()
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Priority = RequestPriority.NORMAL
    session_id: Identifier | None = None
    request_id: Identifier | None = None
    cache_salt: Identifier | None = None
    lora: Identifier | None = None
    kv_budget_tokens: int | None = Field(default=None, gt=0)

    def _check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidArgumentError(
                "stream_options needs stream; set stream to true or leave stream_options out", field="stream_options"
            )

    def to_structured_output(self) -> StructuredOutput | None:
        """Return the form that the body asks for, under whichever name; raises InvalidArgumentError for two of them."""
        if self.__pydantic_fields_set__.isdisjoint(FORM_FIELDS):
            return None
        wanted: dict[str, dict[str, Any]] = {}
        if self.response_format is not None and self.response_format.type != "text":
            schema = self.response_format.json_schema
            wanted["response_format"] = {"json_object": True} if schema is None else {"json_schema": schema.json_schema}
        if self.structured_outputs is not None:
            wanted["structured_outputs"] = self.structured_outputs.given()
        for name, kind in _GUIDED_FIELDS.items():
            value = getattr(self, name)
            if value is not None:
                wanted[name] = {kind: value}
        if not wanted:
            return None
        (field, values), *others = wanted.items()
        # Clients of several versions of vLLM say the same under both of its names.
        other = next((name for name, its_values in others if its_values != values), None)
        if other is not None:
            raise InvalidArgumentError(
                f"{field} and {other} both say what form the answer has; give only one", field=other
            )
        return StructuredOutput(**values)

    def _shared_fields(self) -> dict[str, Any]:
        """Return the fields of the protocol's request but prompt or messages, sampling and ids."""
        fields = self.__dict__
        shared = {
            "model": fields["model"],
            "stream": bool(fields["stream"]),
            "session_id": fields["session_id"],
            "cache_salt": fields["cache_salt"],
            "lora": fields["lora"],
            "kv_budget_tokens": fields["kv_budget_tokens"],
            "metadata": fields["metadata"],
        }
        if fields["priority"] is not _NORMAL:
            shared["priority"] = fields["priority"]
        form = self.to_structured_output()
        if form is not None:
            shared["structured_output"] = form
        return shared

    def _given_sampling(self, **further: Any) -> SamplingParams:
        """Return the sampling fields that were given, and ``further`` ones that aren't None, as SamplingParams."""
        fields = self.__dict__
        given = {name: fields[name] for name in self.__pydantic_fields_set__ & _SAMPLING_FIELDS}
        given.update(further)
        return _sampling(given) if given.get("logit_bias") is not None else _known_sampling(tuple(given.items()))


def _sampling(given: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**{name: value for name, value in given.items() if value is not None and value != ()})


@lru_cache(maxsize=256)
def _known_sampling(given: tuple[tuple[str, Any], ...]) -> SamplingParams:
    """The parameters of ``given``; most clients send the same again and again, and nobody can change them."""
    return _sampling(dict(given))


_GUIDED_FIELDS = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_NORMAL = RequestPriority.NORMAL
FORM_FIELDS = frozenset({"response_format", "structured_outputs", *_GUIDED_FIELDS})
_SAMPLING_FIELDS = frozenset(SamplingParams.model_fields.keys() & GenerationRequest.model_fields.keys())


class PromptTokensDetails(ApiModel):
    """How the prompt's tokens were come by."""

    cached_tokens: int = Field(default=0, ge=0)


class CompletionUsage(ApiModel):
    """Token counts in the API's shape."""

    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)
    total_tokens: int = Field(default=0, ge=0)
    prompt_tokens_details: PromptTokensDetails | None = None

    @classmethod
    def of(cls, usage: Usage) -> CompletionUsage:
        """Return the API's form of ``usage``."""
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        )


class ModelCard(ApiModel):
    """One model of the list; fields after ``owned_by`` are extensions."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(default=0, ge=0, description="Seconds since 1970.")
    owned_by: str = "sagellm"
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = Field(default=None, ge=1)


class ModelList(ApiModel):
    """The answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard] = Field(default_factory=list)


class ErrorBody(ApiModel):
    """What went wrong, in the API's words."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(ApiModel):
    """The body of every answer that isn't a success."""

    error: ErrorBody

    @classmethod
    def of(cls, error: SageLLMError) -> ErrorResponse:
        """Return the body for ``error``; the status to send with it is ``error.http_status``."""
        field = error.context.get("field")
        kind = _ERROR_TYPES.get(error.code, "server_error")
        return cls(
            error=ErrorBody(
                message=error.message, type=kind, param=None if field is None else str(field), code=error.code.value
            )
        )

    def to_exception(self, http_status: int = 500) -> SageLLMError:
        """Return the exception this body stands for; ``http_status`` decides when its code isn't one of ours."""
        known = {code.value: code for code in ErrorCode}
        code = known.get(self.error.code or "") or _code_of_status(http_status)
        context = {} if self.error.param is None else {"field": self.error.param}
        return SageLLMError(self.error.message, code=code, context=context).to_error().to_exception()


def _code_of_status(http_status: int) -> ErrorCode:
    matching = (code for code in ErrorCode if code.http_status == http_status)
    fallback = ErrorCode.INVALID_ARGUMENT if 400 <= http_status < 500 else ErrorCode.INTERNAL
    return next(matching, fallback)


_ERROR_TYPES = {
    ErrorCode.INVALID_ARGUMENT: "invalid_request_error",
    ErrorCode.NOT_FOUND: "invalid_request_error",
    ErrorCode.NOT_IMPLEMENTED: "invalid_request_error",
    ErrorCode.UNAUTHENTICATED: "authentication_error",
    ErrorCode.PERMISSION_DENIED: "permission_error",
    ErrorCode.RESOURCE_EXHAUSTED: "rate_limit_error",
}
