"""Types of ``POST /v1/completions``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.fields import NumLogprobs, NumOutputs, TokenIds
from sagellm_protocol.openai.common import MAX_PROMPTS, ApiModel, CompletionUsage, GenerationRequest
from sagellm_protocol.request import Request
from sagellm_protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Self

Prompts = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)


def split_prompts(prompts: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """Return the single prompts that a ``prompt`` or ``input`` field holds, in order."""
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        return [prompts]
    return list(cast("list[str | list[int]]", prompts))


class CompletionRequest(GenerationRequest):
    """The body of a completion request: one or several prompts, as text or token ids.

    ``suffix`` and a ``best_of`` other than ``n`` aren't offered and are refused.

    Raises:
        InvalidArgumentError: naming the field and the remedy.
    """

    prompt: Prompts
    logprobs: NumLogprobs | None = None
    echo: bool | None = Field(default=None, description="Put the prompt in front of the text.")
    best_of: NumOutputs | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.suffix:
            raise InvalidArgumentError(
                "suffix is not supported; leave it out and put the text into the prompt", field="suffix"
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidArgumentError(
                f"best_of must equal n ({self.n or 1}), got {self.best_of}; leave it out", field="best_of"
            )
        num_choices = len(self.prompts) * (self.n or 1)
        if num_choices > MAX_PROMPTS:
            raise InvalidArgumentError(
                f"n times the number of prompts must be <= {MAX_PROMPTS}, got {num_choices}; send several requests",
                field="n",
            )
        self._check_stream_options()
        self.to_sampling_params()
        self.to_structured_output()
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        return split_prompts(self.prompt)

    def to_sampling_params(self) -> SamplingParams:
        """Return the decoding parameters that the body gives, and only those as given."""
        return self._given_sampling(logprobs=self.logprobs, prompt_logprobs=self.logprobs if self.echo else None)

    def to_requests(self) -> list[Request]:
        """Return one protocol request a prompt; ids are fresh, or the body's with ``-<index>`` if there are several."""
        prompts, params = self.prompts, self.to_sampling_params()
        requests = []
        for index, prompt in enumerate(prompts):
            suffix = f"-{index}" if len(prompts) > 1 else ""
            ids: dict[str, Any] = {} if self.request_id is None else {"request_id": self.request_id + suffix}
            requests.append(Request(**self._shared_fields(), prompt=prompt, sampling_params=params, **ids))
        return requests


class CompletionLogprobs(ApiModel):
    """Logprobs of a text's tokens; the lists run in parallel. The first token of an echoed prompt has None."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float | None] = Field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = Field(default_factory=list)


class CompletionChoice(ApiModel):
    """One text, or (streamed) a piece of one."""

    index: int = Field(default=0, ge=0)
    text: str = ""
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter", "error", "abort"] | None = None
    stop_reason: int | str | None = None


class Completion(ApiModel):
    """The answer to a completion request, and each event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(ge=0, description="Seconds since 1970.")
    model: str
    choices: list[CompletionChoice] = Field(default_factory=list)
    usage: CompletionUsage | None = None
    system_fingerprint: str | None = None
