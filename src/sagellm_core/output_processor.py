"""From the engine core's outputs to what the user sees: text, stream events, metrics and the response.

Holds `OutputProcessor`, one object a sequence, and `combine_outputs` for requests with several. It promises:

- events follow the grammar start, delta*, end; exactly one end, also on error and abort;
- the deltas' chunks concatenated are the end's `output_text`, their tokens its `output_tokens`, and text once sent is
  never taken back: what may be the beginning of a stop string waits;
- without stop strings `output_text` is `tokenizer.decode(output_tokens)`;
- every figure of the metrics was measured with the clock given, or by the engine core.

A stop string ends the text before itself (after itself with `include_stop_str_in_output`) and the tokens with the one
that completed it. The token that ends a sequence (end of sequence, stop token) is one of its tokens but gives no text,
unless `include_stop_str_in_output` asks for it.

Of a resumed sequence the user has the first tokens and their text: these give no events, and all else comes out as it
would have in the first run. Log-probabilities and times are those of the tokens that follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sagellm_core.detokenizer import IncrementalDetokenizer
from sagellm_core.engine_core.types import EngineCoreOutput
from sagellm_core.output_metrics import OutputTimer
from sagellm_core.stop_strings import StopStringMatcher
from sagellm_protocol.errors import Error, SageLLMError
from sagellm_protocol.metrics import Metrics, wall_clock_epoch
from sagellm_protocol.response import CompletionOutput, FinishReason, Response, TokenLogprob, TopLogprob, Usage
from sagellm_protocol.stream import StreamEventDelta, StreamEventEnd, StreamEventStart

if TYPE_CHECKING:
    from sagellm_core.engine_core.types import EngineCoreRequest
    from sagellm_core.sampling.logprobs import TokenLogprobs
    from sagellm_core.tokenizer import Tokenizer
    from sagellm_protocol.request import Request

__all__ = ["OutputProcessor", "combine_outputs"]

_UNFINISHED = (FinishReason.ERROR, FinishReason.ABORT)


class OutputProcessor:
    """Reads the outputs of one sequence and tells its story; for one consumer, not thread-safe.

    `request` is what the user sent, `core` the sequence made of it. `clock` is the engine's monotonic clock,
    the one `core.arrival_time` was read from; `peak_mem_mb` is asked once, at the end.
    """

    def __init__(
        self,
        request: Request,
        core: EngineCoreRequest,
        tokenizer: Tokenizer,
        *,
        engine_id: str = "",
        peak_mem_mb: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
        epoch: float | None = None,
    ) -> None:
        sampling = core.sampling
        self._request, self._core, self._tokenizer = request, core, tokenizer
        self._engine_id = engine_id
        self._detokenizer = IncrementalDetokenizer(tokenizer, sampling.skip_special_tokens)
        self._stops = (
            StopStringMatcher(sampling.stop, keep_match=sampling.include_stop_str_in_output) if sampling.stop else None
        )
        self._timer = OutputTimer(core, clock, wall_clock_epoch() if epoch is None else epoch, peak_mem_mb)
        self._chunks: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if sampling.logprobs is None else []
        self._prompt_logprobs: list[TokenLogprob | None] | None = None
        self._num_cached_tokens = 0
        self._num_resumed = len(core.resumed_token_ids)
        self._is_known = False  # whether the user has what is being taken in
        self._response: Response | None = None

    @property
    def finished(self) -> bool:
        """Whether the sequence has ended. If the engine core still works on it, the caller should abort it there."""
        return self._response is not None

    def response(self) -> Response:
        """The finished answer; asking before the end is a fault of the caller."""
        assert self._response is not None, "response() before the end of the sequence"
        return self._response

    def start(self) -> StreamEventStart:
        """The event that opens the stream."""
        return StreamEventStart(
            request_id=self._request.request_id,
            trace_id=self._request.trace_id,
            engine_id=self._engine_id,
            prompt_tokens=len(self._core.prompt_token_ids),
            seed=self._core.seed,
        )

    def add(self, output: EngineCoreOutput) -> list[StreamEventDelta | StreamEventEnd]:
        """The events that follow from one output. Outputs after the end (the abort was on its way) give none.

        When a stop string completes, the events hold the end and `finished` is True although `output` was not the last.
        """
        if self.finished:
            return []
        events: list[StreamEventDelta | StreamEventEnd] = []
        num_known = self._num_resumed - len(self._token_ids)
        if num_known > 0 and output.finish_reason in _UNFINISHED:
            events, output = self._catch_up(), replace(output, new_token_ids=())
        elif 0 < num_known < len(output.new_token_ids):
            events, output = self._take(_first(output, num_known)), _behind(output, num_known)
        return events if self.finished else events + self._take(output)

    def _take(self, output: EngineCoreOutput) -> list[StreamEventDelta | StreamEventEnd]:
        """`add` for an output whose tokens are all known to the user, or all new."""
        if output.new_token_ids:
            self._is_known = len(self._token_ids) < self._num_resumed
        else:  # what the end of the text released came with its last token
            is_end = output.finished and output.finish_reason not in _UNFINISHED
            self._is_known = is_end and 0 < self._num_resumed == len(self._token_ids)
        self._timer.record(output, 0 if self._is_known else len(output.new_token_ids))
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = [entry and self._to_logprob(entry) for entry in output.prompt_logprobs]
        num_taken, chunk = self._take_text(output)
        reason, stop_reason = output.finish_reason, output.stop_reason
        if self._stops is not None and self._stops.matched is not None:
            reason, stop_reason = _reason_with_match(reason), self._stops.matched
        events: list[StreamEventDelta | StreamEventEnd] = self._delta(output, num_taken, chunk)
        if reason is not None:
            events.append(self._end(reason, stop_reason, output.error))
        return events

    def fail(self, error: SageLLMError) -> list[StreamEventDelta | StreamEventEnd]:
        """End the sequence with an error from outside the engine core; nothing if it has ended already."""
        return self._end_early(FinishReason.ERROR, error.to_error())

    def abort(self, error: SageLLMError | None = None) -> list[StreamEventDelta | StreamEventEnd]:
        """End the sequence because its user gave it up or its time ran out (`error` says which)."""
        return self._end_early(FinishReason.ABORT, None if error is None else error.to_error())

    # ---- text -----------------------------------------------------------------------------------------

    def _take_text(self, output: EngineCoreOutput) -> tuple[int, str]:
        """How many of the new tokens belong to the answer, and the text they release."""
        token_ids = output.new_token_ids
        num_shown = len(token_ids) - self._ends_by_token(output)
        if self._stops is None:
            # One by one: what a token releases must not depend on the company it came in.
            chunk = "".join([self._detokenizer.add((token_id,)) for token_id in token_ids[:num_shown]])
            return len(token_ids), chunk + self._detokenizer.flush() if output.finished else chunk
        chunk = ""
        num_before = self._core.sampled_prefix_len + len(self._token_ids)
        for count, token_id in enumerate(token_ids[:num_shown], start=1):
            may_stop = num_before + count >= self._core.sampling.min_tokens
            chunk += self._stops.feed(self._detokenizer.add((token_id,)), may_stop=may_stop)
            if self._stops.matched is not None:
                return count, chunk
        if output.finished:
            chunk += self._stops.feed(self._detokenizer.flush()) + self._stops.flush()
        return len(token_ids), chunk

    def _ends_by_token(self, output: EngineCoreOutput) -> bool:
        """Whether the last new token is one that ends a sequence and is not shown."""
        sampling = self._core.sampling
        if output.finish_reason is not FinishReason.STOP or not output.new_token_ids:
            return False
        last = output.new_token_ids[-1]
        is_stop = last in sampling.stop_token_ids or (last in self._core.eos_token_ids and not sampling.ignore_eos)
        return is_stop and not sampling.include_stop_str_in_output

    # ---- events ---------------------------------------------------------------------------------------

    def _delta(self, output: EngineCoreOutput, num_taken: int, chunk: str) -> list[StreamEventDelta | StreamEventEnd]:
        token_ids = [int(token_id) for token_id in output.new_token_ids[:num_taken]]
        logprobs = None
        if self._logprobs is not None and output.logprobs is not None and not self._is_known:
            logprobs = [self._to_logprob(entry) for entry in output.logprobs[:num_taken]]
            self._logprobs.extend(logprobs)
        self._token_ids.extend(token_ids)
        return self._emit(chunk, token_ids, logprobs)

    def _emit(
        self, chunk: str, token_ids: list[int], logprobs: list[TokenLogprob] | None
    ) -> list[StreamEventDelta | StreamEventEnd]:
        if not chunk and not token_ids:
            return []
        self._chunks.append(chunk)
        if self._is_known:
            return []
        return [
            StreamEventDelta(
                request_id=self._request.request_id,
                trace_id=self._request.trace_id,
                engine_id=self._engine_id,
                chunk=chunk,
                chunk_tokens=token_ids,
                index=self._core.choice_index,
                logprobs=logprobs,
            )
        ]

    def _end_early(self, reason: FinishReason, error: Error | None) -> list[StreamEventDelta | StreamEventEnd]:
        if self.finished:
            return []
        if len(self._token_ids) < self._num_resumed and (events := self._catch_up()):
            return events  # a stop string ended it
        self._is_known = False
        tail = self._detokenizer.flush()
        if self._stops is not None:
            tail = self._stops.feed(tail) + self._stops.flush()
        return [*self._emit(tail, [], None), self._end(reason, None, error)]

    def _catch_up(self) -> list[StreamEventDelta | StreamEventEnd]:
        """Take in the resumed tokens that are missing, for a sequence that ends before it came so far again."""
        missing = self._core.resumed_token_ids[len(self._token_ids) :]
        return self._take(EngineCoreOutput(self._core.request_id, missing))

    def _end(self, reason: FinishReason, stop_reason: int | str | None, error: Error | None) -> StreamEventEnd:
        output = CompletionOutput(
            index=self._core.choice_index,
            text="".join(self._chunks),
            token_ids=self._token_ids,
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=self._logprobs,
            cumulative_logprob=None if self._logprobs is None else sum(entry.logprob for entry in self._logprobs),
        )
        num_prompt_tokens = len(self._core.prompt_token_ids)
        usage = Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=len(self._token_ids),
            cached_tokens=min(self._num_cached_tokens, num_prompt_tokens),
        )
        self._response = Response.of(
            [output],
            request_id=self._request.request_id,
            trace_id=self._request.trace_id,
            engine_id=self._engine_id,
            model=self._request.model,
            metrics=self._timer.metrics(
                max(0, len(self._token_ids) - self._num_resumed),
                self._num_cached_tokens,
                failed=reason is FinishReason.ERROR,
            ),
            error=error,
            usage=usage,
            prompt_logprobs=self._prompt_logprobs,
        )
        return StreamEventEnd.of(self._response)

    def _to_logprob(self, entry: TokenLogprobs) -> TokenLogprob:
        top = [
            TopLogprob(token_id=token_id, logprob=logprob, rank=rank, token=self._tokenizer.token_text(token_id))
            for token_id, logprob, rank in entry.top
        ]
        text = self._tokenizer.token_text(entry.token_id)
        return TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, rank=entry.rank, token=text, top=top)


def combine_outputs(responses: Sequence[Response]) -> Response:
    """The response of a request with several outputs, from one response an output, in order.

    The prompt is counted once. Metrics are those of `Metrics.aggregate`, except that the memory of all outputs counts
    together and the first token of any is the request's first. A failed output makes the request failed.
    """
    if len(responses) == 1:
        return responses[0]
    outputs = [output for response in responses for output in response.outputs]
    first = responses[0]
    failed = next((response for response in responses if response.error is not None), first)
    metrics = Metrics.aggregate([response.metrics for response in responses]).model_copy(
        update={
            "ttft_ms": min((r.metrics.ttft_ms for r in responses if r.output_tokens), default=0.0),
            "kv_used_tokens": sum(response.metrics.kv_used_tokens for response in responses),
            "kv_used_bytes": sum(response.metrics.kv_used_bytes for response in responses),
        }
    )
    usage = Usage(
        prompt_tokens=first.usage.prompt_tokens,
        completion_tokens=sum(response.usage.completion_tokens for response in responses),
        cached_tokens=first.usage.cached_tokens,
    )
    changes = {"outputs": outputs, "metrics": metrics, "usage": usage}
    return first.model_copy(update={**changes, "finish_reason": failed.finish_reason, "error": failed.error})


def _first(output: EngineCoreOutput, num_tokens: int) -> EngineCoreOutput:
    """An output with the first tokens only, which ends nothing."""
    return EngineCoreOutput(
        output.request_id, output.new_token_ids[:num_tokens], num_cached_tokens=output.num_cached_tokens
    )


def _behind(output: EngineCoreOutput, num_tokens: int) -> EngineCoreOutput:
    """An output without its first tokens; the log-probabilities are of the last ones, in any case."""
    rest = output.new_token_ids[num_tokens:]
    logprobs = None if output.logprobs is None else output.logprobs[-len(rest) :]
    return replace(output, new_token_ids=rest, logprobs=logprobs)


def _reason_with_match(reason: FinishReason | None) -> FinishReason:
    """A stop string turns every regular ending into STOP; an error or an abort stays what it is."""
    return reason if reason in _UNFINISHED else FinishReason.STOP
