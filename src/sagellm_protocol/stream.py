"""The events of a streamed answer: one start, deltas, exactly one end (on error and abort too).

The concatenated ``chunk`` of the deltas of index 0 is the end's ``output_text``, their ``chunk_tokens`` its
``output_tokens``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from sagellm_protocol.errors import Error
from sagellm_protocol.metrics import Metrics
from sagellm_protocol.model import ProtocolModel
from sagellm_protocol.response import CompletionOutput, FinishReason, Response, TokenLogprob, Usage
from sagellm_protocol.validation import invalid_argument


class _StreamEvent(ProtocolModel):
    """What every event says about where it belongs."""

    request_id: str
    trace_id: str = ""
    engine_id: str = ""


class StreamEventStart(_StreamEvent):
    """The request is accepted and its prompt counted."""

    event: Literal["start"] = "start"
    prompt_tokens: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, description="That the request runs with, given or drawn; for `resume_from`.")


class StreamEventDelta(_StreamEvent):
    """New text and tokens of one output. Either may be empty: text waits for a whole character or stop string."""

    event: Literal["delta"] = "delta"
    chunk: str = ""
    chunk_tokens: list[int] = Field(default_factory=list)
    index: int = Field(default=0, ge=0, description="Which output, with n > 1.")
    logprobs: list[TokenLogprob] | None = Field(default=None, description="One for each of chunk_tokens.")


class StreamEventEnd(_StreamEvent):
    """The request is over; the same fields as a Response."""

    event: Literal["end"] = "end"
    output_text: str = ""
    output_tokens: list[int] = Field(default_factory=list)
    finish_reason: FinishReason
    metrics: Metrics = Field(default_factory=Metrics)
    error: Error | None = None
    outputs: list[CompletionOutput] = Field(default_factory=list)
    usage: Usage = Field(default_factory=Usage)
    stop_reason: int | str | None = None

    @classmethod
    def of(cls, response: Response) -> StreamEventEnd:
        """Return the event that ends the stream of ``response``."""
        return cls(**{name: getattr(response, name) for name in cls.model_fields if name != "event"})

    def to_response(self) -> Response:
        """Return what ``generate`` would have returned."""
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "event"}
        return Response(**fields, logprobs=self.outputs[0].logprobs if self.outputs else None)


StreamEvent = Annotated[StreamEventStart | StreamEventDelta | StreamEventEnd, Field(discriminator="event")]

STREAM_EVENT_ADAPTER: TypeAdapter[StreamEventStart | StreamEventDelta | StreamEventEnd] = TypeAdapter(StreamEvent)


def parse_stream_event(
    data: Mapping[str, Any] | str | bytes,
) -> StreamEventStart | StreamEventDelta | StreamEventEnd:
    """Return the event that ``data`` (a mapping or a JSON document) holds; raises InvalidArgumentError."""
    try:
        if isinstance(data, (str, bytes)):
            return STREAM_EVENT_ADAPTER.validate_json(data)
        return STREAM_EVENT_ADAPTER.validate_python(data)
    except ValidationError as error:
        models = (StreamEventStart, StreamEventDelta, StreamEventEnd)
        raise invalid_argument(error, models, what="stream event") from error
