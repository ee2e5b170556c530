"""One answer of the transformers engine while it grows: text, tokens, times, how it ended."""

from __future__ import annotations

import itertools
import time
from typing import Any

from sagellm_backend.engine.hf_generate import Generator, TextStream
from sagellm_protocol import (
    Error,
    FinishReason,
    InternalError,
    Metrics,
    Request,
    Response,
    SageLLMError,
    SamplingParams,
    StreamEventDelta,
    StreamEventEnd,
    Timestamps,
    Usage,
    wall_clock_epoch,
)


class HFAnswer:
    """What is known of one answer so far: text, tokens, times, how it ended."""

    def __init__(
        self, request: Request, engine_id: str, params: SamplingParams, generator: Generator, num_prompt_tokens: int
    ) -> None:
        self.names: dict[str, Any] = {
            "request_id": request.request_id,
            "trace_id": request.trace_id,
            "engine_id": engine_id,
        }
        self.scheduled_at: float | None = None
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._queued_at = time.monotonic()
        self._token_times: list[float] = []
        self._token_ids: list[int] = []
        self._chunks: list[str] = []
        self._finish_reason = FinishReason.LENGTH
        self._stop_reason: str | None = None
        self._error: Error | None = None
        self._text = TextStream(
            lambda ids: generator.decode(ids, skip_special_tokens=params.skip_special_tokens),
            params.stop,
            keep_stop=params.include_stop_str_in_output,
        )

    def is_over(self) -> bool:
        """Whether a stop string was found."""
        return self._text.matched is not None

    def add(self, token_ids: list[int]) -> StreamEventDelta:
        """Take in new tokens."""
        self._token_times += [time.monotonic()] * len(token_ids)
        self._token_ids += token_ids
        return self._delta(self._text.add(token_ids), token_ids)

    def flush(self) -> StreamEventDelta | None:
        """The text that was held back, if any."""
        rest = "" if self.is_over() else self._text.flush()
        delta = self._delta(rest, []) if rest else None
        if self.is_over():
            self._finish_reason, self._stop_reason = FinishReason.STOP, self._text.matched
        return delta

    def finish(self, reason: FinishReason) -> None:
        """The generation ended by itself, or because it was told to."""
        self._finish_reason = reason

    def fail(self, error: Exception) -> None:
        """The generation broke."""
        self._finish_reason = FinishReason.ERROR
        known = error if isinstance(error, SageLLMError) else InternalError(f"{type(error).__name__}: {error}")
        self._error = known.to_error()

    def end(self, peak_mem_mb: float) -> StreamEventEnd:
        """The event that closes the stream."""
        response = Response(
            **self.names,
            output_text="".join(self._chunks),
            output_tokens=self._token_ids,
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
            error=self._error,
            metrics=self._metrics(peak_mem_mb),
            usage=Usage(prompt_tokens=self._num_prompt_tokens, completion_tokens=len(self._token_ids)),
        )
        return StreamEventEnd.of(response)

    def _delta(self, text: str, token_ids: list[int]) -> StreamEventDelta:
        self._chunks.append(text)
        return StreamEventDelta(**self.names, chunk=text, chunk_tokens=token_ids)

    def _metrics(self, peak_mem_mb: float) -> Metrics:
        now, times = time.monotonic(), self._token_times
        gaps = [(b - a) * 1e3 for a, b in itertools.pairwise(times)]
        first = times[0] if times else None
        return Metrics(
            ttft_ms=(first - self._queued_at) * 1e3 if first is not None else 0.0,
            tbt_ms=sum(gaps) / len(gaps) if gaps else 0.0,
            tpot_ms=sum(gaps) / len(gaps) if gaps else 0.0,
            throughput_tps=len(times) / (now - self._queued_at) if now > self._queued_at else 0.0,
            peak_mem_mb=peak_mem_mb,
            error_rate=1.0 if self._error is not None else 0.0,
            kv_used_tokens=self._num_prompt_tokens + len(times),
            prefill_ms=(first - (self.scheduled_at or self._queued_at)) * 1e3 if first is not None else 0.0,
            decode_ms=(times[-1] - times[0]) * 1e3 if times else 0.0,
            itl_list=gaps,
            timestamps=Timestamps(
                queued_at=self._queued_at,
                scheduled_at=self.scheduled_at,
                executed_at=self.scheduled_at,
                first_token_at=first,
                completed_at=now,
                epoch=wall_clock_epoch(),
            ),
        )
