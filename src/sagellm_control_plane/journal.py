"""What the caller of a request has received, token by token: from here another engine can go on."""

from __future__ import annotations

from dataclasses import dataclass, field

from sagellm_control_plane.prompts import num_outputs
from sagellm_protocol import (
    CompletionOutput,
    FinishReason,
    InternalError,
    Metrics,
    Request,
    Response,
    ResumePoint,
    SageLLMError,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    TokenLogprob,
    Usage,
)


@dataclass(slots=True)
class _Choice:
    """One output as far as it has been delivered."""

    token_ids: list[int] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Journal:
    """The events of one request that its caller has received, over all the engines it ran on.

    However often a request moves, the events that pass `start`, `fresh` and `end` are one stream: one start, every
    token once, one end that holds them all. Whoever delivers the next tokens appends their event to `fresh`; `read`
    enters them, some at a time and the last before anything else is asked of the journal.
    """

    __slots__ = (
        "_choices",
        "_num_prompt_tokens",
        "_request",
        "_seed",
        "fresh",
        "has_started",
        "num_resumed",
        "num_tokens",
    )

    def __init__(self, request: Request) -> None:
        self._request = request
        self._choices: dict[int, _Choice] = {}
        self.fresh: list[StreamEventDelta] = []  # delivered, and not read yet
        self._seed: int | None = None
        self._num_prompt_tokens = 0
        self.has_started = False
        self.num_tokens = 0  # delivered and read, of all outputs
        self.num_resumed = 0  # of these, how many an earlier engine made than the one that runs it now

    # ---- what an engine says --------------------------------------------------------------------------

    def start(self, event: StreamEventStart) -> bool:
        """An engine has begun; whether its event is news to the caller."""
        is_first, self.has_started = not self.has_started, True
        if is_first:
            self._seed = event.seed
        self._num_prompt_tokens = event.prompt_tokens
        return is_first

    def read(self) -> int:
        """Enter what is fresh; the number of its tokens."""
        num_tokens = 0
        for event in self.fresh:
            index, token_ids, logprobs = event.index, event.chunk_tokens, event.logprobs
            choice = self._choices.get(index)
            if choice is None:
                choice = self._choices[index] = _Choice()
            choice.token_ids += token_ids
            choice.chunks.append(event.chunk)
            if logprobs is not None:
                choice.logprobs += logprobs
            num_tokens += len(token_ids)
        self.fresh.clear()
        self.num_tokens += num_tokens
        return num_tokens

    def end(self, event: StreamEventEnd, ttft_s: float | None = None) -> StreamEventEnd:
        """The end as the caller gets it: of an answer that several engines made, the whole.

        `ttft_s` is the time of the first engine to the first token; the last one's is no figure of this answer. Raises
        `InternalError` where the last engine's answer does not begin with what was delivered.
        """
        if not self.num_resumed:
            return event
        outputs = [self._whole(output) for output in event.outputs]
        metrics = event.metrics if ttft_s is None else event.metrics.model_copy(update={"ttft_ms": ttft_s * 1e3})
        return event.model_copy(update={"outputs": outputs, "metrics": metrics})

    # ---- what others are told -------------------------------------------------------------------------

    def remainder(self) -> Request:
        """The request for the next engine: to go on behind what was delivered."""
        self.num_resumed = self.num_tokens
        if not self.has_started:
            return self._request
        delivered: list[list[int]] = []
        if self.num_tokens:
            count, nothing = max(num_outputs(self._request), max(self._choices) + 1), _Choice()
            delivered = [list(self._choices.get(index, nothing).token_ids) for index in range(count)]
        resume_from = ResumePoint(output_token_ids=delivered, seed=self._known_seed())
        return self._request.model_copy(update={"resume_from": resume_from})

    def broken_end(self, error: SageLLMError, reason: FinishReason, engine_id: str) -> StreamEventEnd:
        """The end of an answer that nobody can go on with: what was delivered, and why it ends."""
        nothing = _Choice()
        choices = [self._choices.get(index, nothing) for index in range(max(self._choices, default=0) + 1)]
        outputs = [
            CompletionOutput(
                index=index,
                text="".join(choice.chunks),
                token_ids=choice.token_ids,
                finish_reason=reason,
                logprobs=choice.logprobs or None,
            )
            for index, choice in enumerate(choices)
        ]
        response = Response.of(
            outputs,
            request_id=self._request.request_id,
            trace_id=self._request.trace_id,
            engine_id=engine_id,
            model=self._request.model,
            metrics=Metrics(error_rate=1.0),
            error=error.to_error(),
            usage=Usage(prompt_tokens=self._num_prompt_tokens, completion_tokens=self.num_tokens),
        )
        return StreamEventEnd.of(response)

    # ---- steps of the above ---------------------------------------------------------------------------

    def _known_seed(self) -> int:
        """The seed it runs with. An engine that does not tell draws anew: its tokens are another sample, as good."""
        if self._seed is not None:
            return self._seed
        sampling = self._request.sampling_params
        return 0 if sampling is None else sampling.seed or 0

    def _whole(self, output: CompletionOutput) -> CompletionOutput:
        """One output with the log-probabilities of all of its tokens."""
        choice = self._choices.get(output.index, _Choice())
        if output.token_ids != choice.token_ids:
            raise InternalError(
                f"the engine that went on with {self._request.request_id} made another answer than the one delivered; "
                "report this with the request",
                request_id=self._request.request_id,
                choice=output.index,
            )
        if not choice.logprobs:
            return output
        total = sum(entry.logprob for entry in choice.logprobs)
        return output.model_copy(update={"logprobs": choice.logprobs, "cumulative_logprob": total})
