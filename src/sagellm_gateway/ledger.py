"""The requests that calls cause, on their way to the control plane: in whose name they run, and what they use.

Every request takes the same way, so that no route can forget a limit: it gets the trace, tenant, priority and SLO of
the call it serves (`current_caller`); its tokens are reserved by estimate before it runs and settled to what it used
when it ends. Where nobody's tokens are limited nothing is reserved.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from sagellm_control_plane import ControlPlaneManager
from sagellm_control_plane.prompts import estimate_prompt_tokens, num_outputs, output_limit
from sagellm_core.answers import Answers, Observer
from sagellm_gateway.context import Caller, current_caller
from sagellm_gateway.rates import Meter, Window
from sagellm_protocol import Request, RequestPriority, Response, StreamEvent, StreamEventDelta, StreamEventEnd

# What is reserved for the answer of a request that doesn't say how long it may be.
ESTIMATED_OUTPUT_TOKENS = 256


class Ledger(Answers):
    """Executes and streams requests of the protocol for whoever calls, and tells the observers of each that ends.

    With `keep_prompts` their texts are noted for the access log.
    """

    def __init__(self, manager: ControlPlaneManager, *observers: Observer, keep_prompts: bool = False) -> None:
        super().__init__(manager.execute_request, manager.stream_request, _note_tokens, *observers)
        if keep_prompts:
            self._observers += (_note_prompt,)
        self._manager = manager

    async def execute(self, request: Request) -> Response:
        """As `Answers`; raises `ResourceExhaustedError` where its tokens exceed a limit now."""
        caller = current_caller.get()
        if caller is None:
            return await super().execute(request)
        request = _in_name_of(caller, request)
        if not caller.meters:
            return await super().execute(request)
        with _Reserved(caller.meters, self._estimate(request)) as reservation:
            response = await super().execute(request)
            reservation.num_used = response.usage.total_tokens
            return response

    def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """As `Answers`; raises `ResourceExhaustedError` where its tokens exceed a limit now."""
        caller = current_caller.get()
        if caller is None:
            return super().stream(request)
        request = _in_name_of(caller, request)
        events = super().stream(request)
        return self._metered(events, caller.meters, request) if caller.meters else events

    async def _metered(
        self, events: AsyncGenerator[StreamEvent, None], meters: tuple[Meter, ...], request: Request
    ) -> AsyncGenerator[StreamEvent, None]:
        with _Reserved(meters, self._estimate(request)) as reservation:
            async with aclosing(events):
                async for event in events:
                    # Counted as it goes: who leaves in the midst has used what was made until then.
                    if isinstance(event, StreamEventDelta):
                        reservation.num_used += len(event.chunk_tokens)
                    elif isinstance(event, StreamEventEnd):
                        reservation.num_used = event.usage.total_tokens
                    else:
                        reservation.num_used = event.prompt_tokens
                    yield event

    def _estimate(self, request: Request) -> int:
        limit = output_limit(request)
        # No answer is longer than a model's context, whatever was asked for.
        longest = self._manager.max_model_len
        num_output_tokens = min(ESTIMATED_OUTPUT_TOKENS if limit is None else limit, longest)
        return estimate_prompt_tokens(request) + num_output_tokens * num_outputs(request)


def _in_name_of(caller: Caller, request: Request) -> Request:
    """The request with what the call's headers and key say, see `Caller.request_fields`."""
    if request.trace_id == caller.trace_id:
        return request  # it was made so
    changes = caller.request_fields()
    if "request_id" in request.model_fields_set:
        del changes["request_id"]
    if request.priority is not RequestPriority.NORMAL:
        changes.pop("priority", None)
    if request.slo is not None:
        del changes["slo"]
    return request.model_copy(update=changes)


class _Reserved:
    """Books tokens while the body runs, then what they became: `num_used`, also where an exception ends it."""

    __slots__ = ("_booked", "_meters", "_num_tokens", "num_used")

    def __init__(self, meters: tuple[Meter, ...], num_tokens: int) -> None:
        self.num_used = 0
        self._meters = meters
        self._num_tokens = num_tokens
        self._booked: list[tuple[Window, int]] = []  # and the step to correct it by

    def __enter__(self) -> _Reserved:
        num_tokens = self._num_tokens
        for meter in self._meters:
            meter.check_tokens(num_tokens)
        windows = [meter.tokens for meter in self._meters if meter.tokens is not None]
        self._booked = [(window, window.book(num_tokens)) for window in windows]
        return self

    def __exit__(self, *_: object) -> None:
        for window, step in self._booked:
            window.correct(step, self.num_used - self._num_tokens)


def _note_tokens(_: Request, answer: Response | StreamEventEnd, __: float) -> None:
    caller = current_caller.get()
    if caller is not None:
        usage = answer.usage
        caller.num_prompt_tokens += usage.prompt_tokens
        caller.num_output_tokens += usage.completion_tokens


def _note_prompt(request: Request, _: Response | StreamEventEnd, __: float) -> None:
    caller = current_caller.get()
    if caller is not None:
        caller.prompts += (_text_of(request),)


def _text_of(request: Request) -> str:
    if request.messages is not None:
        return "\n".join(f"{message.role}: {message.text}" for message in request.messages)
    return request.prompt if isinstance(request.prompt, str) else str(request.prompt)
