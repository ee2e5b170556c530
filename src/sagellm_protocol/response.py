"""A finished answer: text, tokens, why it ended, what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field, model_validator

from sagellm_protocol.errors import Error, InvalidArgumentError
from sagellm_protocol.metrics import Metrics
from sagellm_protocol.model import ProtocolEnum, ProtocolModel

if TYPE_CHECKING:
    from typing_extensions import Self

MIN_LOGPROB = -9999.0


def _finite_logprob(value: object) -> object:
    """Write the logarithm of zero as a number that JSON knows, the one the OpenAI API uses."""
    return MIN_LOGPROB if isinstance(value, float) and value < MIN_LOGPROB else value


Logprob = Annotated[float, BeforeValidator(_finite_logprob), Field(description="Natural logarithm; -9999 for zero.")]


class FinishReason(ProtocolEnum):
    """Why an output ended."""

    STOP = "stop"  # end-of-sequence token, stop string or stop token
    LENGTH = "length"  # max_tokens, or the model's context is full
    ERROR = "error"  # see the error
    ABORT = "abort"  # the caller gave up, or the deadline passed


class Usage(ProtocolModel):
    """Tokens that went in and came out."""

    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0, description="Of all outputs together.")
    cached_tokens: int = Field(default=0, ge=0, description="Prompt tokens whose KV was found in the prefix cache.")

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class TopLogprob(ProtocolModel):
    """One candidate at a position."""

    token_id: int = Field(ge=0)
    logprob: Logprob
    rank: int | None = Field(default=None, ge=1, description="1 is the most probable.")
    token: str | None = Field(default=None, description="The token's text, where it was asked for.")


class TokenLogprob(TopLogprob):
    """The chosen token of a position and its most probable candidates, best first."""

    top: list[TopLogprob] = Field(default_factory=list)


class CompletionOutput(ProtocolModel):
    """One output of a request."""

    index: int = Field(default=0, ge=0)
    text: str = ""
    token_ids: list[int] = Field(default_factory=list)
    finish_reason: FinishReason
    stop_reason: int | str | None = Field(
        default=None, description="The stop string or token id that ended it; None: others."
    )
    logprobs: list[TokenLogprob] | None = None
    cumulative_logprob: float | None = None


class Response(ProtocolModel):
    """The answer to a Request.

    ``outputs`` holds every output (``n`` of them, best first for beam search); ``output_text``, ``output_tokens``,
    ``finish_reason``, ``stop_reason`` and ``logprobs`` are the first's. A Response made without ``outputs`` gets its
    one from those fields. With ``finish_reason`` ERROR there is an ``error``; with ABORT it may say why.
    """

    request_id: str
    trace_id: str = ""
    output_text: str = ""
    output_tokens: list[int] = Field(default_factory=list)
    finish_reason: FinishReason
    metrics: Metrics = Field(default_factory=Metrics)
    error: Error | None = None
    outputs: list[CompletionOutput] = Field(default_factory=list)
    usage: Usage = Field(default_factory=Usage)
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = Field(
        default=None, description="One a prompt token, the first None."
    )
    embedding: list[float] | None = Field(default=None, description="The vector, where the request asked for one.")
    model: str = ""
    engine_id: str = ""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.finish_reason is FinishReason.ERROR) and self.error is None:
            raise InvalidArgumentError("error is required with finish_reason 'error'; say what failed", field="error")
        if not self.outputs:
            # Written past the frozen guard on purpose: a derived value must not count as given.
            self.__dict__["outputs"] = [self._first_output()]
        elif self.outputs[0].text != self.output_text or self.outputs[0].token_ids != self.output_tokens:
            raise InvalidArgumentError(
                "outputs[0] must equal output_text and output_tokens; build it with Response.of", field="outputs"
            )
        return self

    def _first_output(self) -> CompletionOutput:
        return CompletionOutput(
            text=self.output_text,
            token_ids=self.output_tokens,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=self.logprobs,
        )

    @classmethod
    def of(cls, outputs: list[CompletionOutput], **fields: object) -> Response:
        """Return the Response with these outputs (at least one) and these further fields."""
        first = outputs[0]
        return cls(
            output_text=first.text,
            output_tokens=first.token_ids,
            finish_reason=first.finish_reason,
            stop_reason=first.stop_reason,
            logprobs=first.logprobs,
            outputs=outputs,
            **fields,  # type: ignore[arg-type]
        )

    def raise_for_error(self) -> Self:
        """Return self, or raise the error it carries as its exception."""
        if self.error is not None:
            raise self.error.to_exception()
        return self
