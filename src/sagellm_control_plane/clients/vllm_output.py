"""vLLM's outputs in the protocol's words: one start, deltas, one end, with times as they were seen here."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from sagellm_control_plane.clock import Clock
from sagellm_protocol import (
    CompletionOutput,
    FinishReason,
    InternalError,
    Metrics,
    Request,
    Response,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    TokenLogprob,
    TopLogprob,
    Usage,
)

_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


class _Choice:
    """One output so far."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None


class VLLMAnswer:
    """One request's answer as it comes from vLLM."""

    def __init__(
        self, request: Request, engine_id: str, prompt: list[int], num_choices: int, clock: Clock, tokenizer: Any
    ) -> None:
        self._names: dict[str, Any] = {
            "request_id": request.request_id,
            "trace_id": request.trace_id,
            "engine_id": engine_id,
        }
        self.is_aborted = False  # its caller wants no more
        self._num_prompt_tokens = len(prompt)
        self._num_cached_tokens = 0
        self._choices = [_Choice() for _ in range(num_choices)]
        self._clock = clock
        self._tokenizer = tokenizer
        self._began_at = clock.now()
        self._token_times: list[float] = []

    def start(self, seed: int | None) -> StreamEventStart:
        """The first event."""
        return StreamEventStart(prompt_tokens=self._num_prompt_tokens, seed=seed, **self._names)

    def add(self, output: Any) -> list[StreamEventDelta]:
        """What a `RequestOutput` brings."""
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens or 0)
        return [delta for part in output.outputs if (delta := self._add_part(part)) is not None]

    def end(self) -> StreamEventEnd:
        """The last event."""
        outputs = [self._output(index, choice) for index, choice in enumerate(self._choices)]
        num_tokens = sum(len(output.token_ids) for output in outputs)
        failed = next((output for output in outputs if output.finish_reason is FinishReason.ERROR), None)
        error = None if failed is None else InternalError("vLLM failed on this request; its log says why").to_error()
        response = Response.of(
            outputs,
            metrics=self._metrics(num_tokens, is_failed=failed is not None),
            error=error,
            usage=Usage(
                prompt_tokens=self._num_prompt_tokens,
                completion_tokens=num_tokens,
                cached_tokens=min(self._num_cached_tokens, self._num_prompt_tokens),
            ),
            **self._names,
        )
        if failed is not None:
            response = response.model_copy(update={"finish_reason": FinishReason.ERROR})
        return StreamEventEnd.of(response)

    def _add_part(self, part: Any) -> StreamEventDelta | None:
        choice, token_ids = self._choices[part.index], [int(token_id) for token_id in part.token_ids]
        choice.text += part.text
        choice.token_ids += token_ids
        choice.finish_reason = part.finish_reason or choice.finish_reason
        choice.stop_reason = part.stop_reason if part.stop_reason is not None else choice.stop_reason
        logprobs = None
        if part.logprobs:
            logprobs = [
                self._logprob(token_id, entry) for token_id, entry in zip(token_ids, part.logprobs, strict=False)
            ]
            choice.logprobs += logprobs
        if token_ids:
            self._token_times.append(self._clock.now())
        if not part.text and not token_ids:
            return None
        return StreamEventDelta(
            chunk=part.text, chunk_tokens=token_ids, index=part.index, logprobs=logprobs, **self._names
        )

    def _logprob(self, token_id: int, entry: Any) -> TokenLogprob:
        top = [
            TopLogprob(token_id=other, logprob=found.logprob, rank=found.rank or None, token=self._text(other, found))
            for other, found in sorted(entry.items(), key=lambda item: -item[1].logprob)
        ]
        own = entry[token_id]
        return TokenLogprob(
            token_id=token_id, logprob=own.logprob, rank=own.rank or None, token=self._text(token_id, own), top=top
        )

    def _text(self, token_id: int, found: Any) -> str:
        return str(found.decoded_token if found.decoded_token is not None else self._tokenizer.decode([token_id]))

    def _output(self, index: int, choice: _Choice) -> CompletionOutput:
        return CompletionOutput(
            index=index,
            text=choice.text,
            token_ids=choice.token_ids,
            finish_reason=_REASONS.get(choice.finish_reason or "abort", FinishReason.ERROR),
            stop_reason=choice.stop_reason,
            logprobs=choice.logprobs or None,
            cumulative_logprob=sum(entry.logprob for entry in choice.logprobs) if choice.logprobs else None,
        )

    def _metrics(self, num_tokens: int, *, is_failed: bool) -> Metrics:
        times, now = self._token_times, self._clock.now()
        if not times:
            return Metrics(error_rate=float(is_failed))
        gaps = [(after - before) * 1e3 for before, after in pairwise(times)]
        mean_gap = sum(gaps) / len(gaps) if gaps else 0.0
        return Metrics(
            ttft_ms=(times[0] - self._began_at) * 1e3,
            tbt_ms=mean_gap,
            tpot_ms=(times[-1] - times[0]) * 1e3 / max(1, num_tokens - 1),
            throughput_tps=num_tokens / max(now - self._began_at, 1e-9),
            prefix_hit_rate=min(1.0, self._num_cached_tokens / max(1, self._num_prompt_tokens)),
            error_rate=float(is_failed),
            itl_list=gaps,
        )
