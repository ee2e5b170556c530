"""Traces for OpenTelemetry: one server span a call, described by its conventions for generative AI.

https://opentelemetry.io/docs/specs/semconv/gen-ai/ names the attributes. What was said is never written into a span.
Without an endpoint none of this is there. The span itself is begun and ended by `middleware.tracing`; `Tracing.observe`
is told of the requests that ran meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field

from sagellm_core.version import __version__
from sagellm_protocol import EdgeModel, Request, Response, StreamEventEnd, UnsupportedError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span, Tracer


class TracingSettings(EdgeModel):
    """Where traces go. Headers that a collector wants stand in `OTEL_EXPORTER_OTLP_HEADERS`."""

    endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://",
        max_length=2048,
        description="OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; None: no traces.",
    )
    service_name: str = Field(default="sagellm", min_length=1, max_length=256)
    sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Share of the calls that are traced, where their caller doesn't decide."
    )


@dataclass(slots=True)
class CallTrace:
    """A call's span, and what its requests have added up to."""

    span: Span
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)  # gen_ai.*, of the first request


current_trace: ContextVar[CallTrace | None] = ContextVar("current_trace", default=None)


class Tracing:
    """Makes spans and sends them from a thread of its own; raises `UnsupportedError` where the extra is missing."""

    def __init__(
        self, settings: TracingSettings, explain: Callable[[str], dict[str, Any]] = lambda request_id: {}
    ) -> None:
        """`explain` gives further attributes of a request, by its id."""
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError as error:
            raise UnsupportedError("traces need OpenTelemetry; install it: pip install 'isagellm[otel]'") from error
        self._explain = explain
        assert settings.endpoint is not None, "without an endpoint there are no traces"
        resource = Resource.create({"service.name": settings.service_name, "service.version": __version__})
        sampler = ParentBased(TraceIdRatioBased(settings.sample_ratio))
        # Stopped by `close`, not by the interpreter's end.
        self._provider = TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=False)
        self._provider.add_span_processor(make_processor(settings.endpoint))
        self.tracer: Tracer = self._provider.get_tracer("sagellm_gateway", __version__)

    async def close(self) -> None:
        """Send what is left."""
        await asyncio.to_thread(self._provider.shutdown)

    def observe(self, request: Request, answer: Response | StreamEventEnd, waited_s: float) -> None:
        """Note a request that has ended at the span of its call."""
        trace = current_trace.get()
        if trace is None or not trace.span.is_recording():
            return
        usage = answer.usage
        trace.num_input_tokens += usage.prompt_tokens
        trace.num_cached_tokens += usage.cached_tokens
        trace.num_output_tokens += usage.completion_tokens
        trace.finish_reasons += [output.finish_reason.value for output in answer.outputs] or [
            answer.finish_reason.value
        ]
        if not trace.attributes:
            trace.attributes = {**_request_attributes(request), **self._explain(request.request_id)}
            if answer.metrics.ttft_ms:
                trace.attributes["gen_ai.response.time_to_first_chunk"] = answer.metrics.ttft_ms / 1e3 + waited_s
        if answer.error is not None:
            trace.attributes["error.type"] = answer.error.code.value


def end_trace(trace: CallTrace) -> None:
    """Write what the requests of a call were into its span."""
    if not trace.attributes:
        return
    trace.span.set_attributes(
        {
            **trace.attributes,
            "gen_ai.usage.input_tokens": trace.num_input_tokens,
            "gen_ai.usage.cache_read.input_tokens": trace.num_cached_tokens,
            "gen_ai.usage.output_tokens": trace.num_output_tokens,
            "gen_ai.response.finish_reasons": trace.finish_reasons,
        }
    )
    trace.span.update_name(f"{trace.attributes['gen_ai.operation.name']} {trace.attributes['gen_ai.request.model']}")


def make_processor(endpoint: str) -> SpanProcessor:
    """Sends spans to a collector, in batches."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))


def _request_attributes(request: Request) -> dict[str, Any]:
    sampling = request.resolved_sampling()
    given = sampling.model_fields_set
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": _operation(request),
        "gen_ai.provider.name": "sagellm",
        "gen_ai.request.model": request.model,
        "gen_ai.response.model": request.model,
        "gen_ai.response.id": request.request_id,
    }
    if request.embed is not None:  # nothing is sampled
        return attributes
    attributes["gen_ai.request.stream"] = request.stream
    for field_name, attribute in _SAMPLING_ATTRIBUTES.items():
        value = getattr(sampling, field_name)
        if field_name in given and value is not None:
            attributes[attribute] = value
    if sampling.n > 1:
        attributes["gen_ai.request.choice.count"] = sampling.n
    return attributes


def _operation(request: Request) -> str:
    if request.embed is not None:
        return "embeddings"
    return "text_completion" if request.messages is None else "chat"


_SAMPLING_ATTRIBUTES = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "stop": "gen_ai.request.stop_sequences",
}
