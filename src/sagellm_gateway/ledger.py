"""The tokens of every request: reserved by estimate before it runs, settled to what it used when it ends.

Stands between the routes and the control plane, so that no route can forget it. Who calls is `current_caller`. Where
nobody's tokens are limited it is out of the way: requests pass straight to the manager.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from sagellm_control_plane import ControlPlaneManager
from sagellm_control_plane.admission import estimate_prompt_tokens
from sagellm_gateway.context import Caller, current_caller
from sagellm_protocol import Request, Response, StreamEvent, StreamEventDelta, StreamEventEnd

# What is reserved for the answer of a request that doesn't say how long it may be.
ESTIMATED_OUTPUT_TOKENS = 256


@dataclass(slots=True)
class Reservation:
    """Tokens that were booked ahead; set `num_used` to what they became."""

    num_used: int


class Ledger:
    """Executes and streams requests of the protocol for whoever calls; see the module.

    With `keep_prompts` their texts are noted for the access log.
    """

    def __init__(self, manager: ControlPlaneManager, *, keep_prompts: bool = False) -> None:
        self._manager = manager
        self._keep_prompts = keep_prompts

    async def execute(self, request: Request) -> Response:
        """As the manager's; raises `ResourceExhaustedError` where its tokens exceed a limit now."""
        caller = current_caller.get()
        request = _within_deadline(request, caller)
        if caller is None or not caller.meters:
            return await self._manager.execute_request(request)
        with self.reserve(self._estimate(request)) as reservation:
            response = await self._manager.execute_request(request)
            reservation.num_used = response.usage.total_tokens
            return response

    def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """As the manager's; raises `ResourceExhaustedError` where its tokens exceed a limit now."""
        caller = current_caller.get()
        request = _within_deadline(request, caller)
        if caller is None or not caller.meters:
            return self._manager.stream_request(request)
        return self._metered(request)

    def observe(self, request: Request, answer: Response | StreamEventEnd, _: float) -> None:
        """Note at its caller what a request used; to be told of each that ends."""
        caller = current_caller.get()
        if caller is not None:
            caller.num_prompt_tokens += answer.usage.prompt_tokens
            caller.num_output_tokens += answer.usage.completion_tokens
            if self._keep_prompts:
                caller.prompts.append(_text_of(request))

    @contextmanager
    def reserve(self, num_tokens: int) -> Iterator[Reservation]:
        """Book tokens for the caller while the body runs, then what they became; an exception leaves `num_used`."""
        caller = current_caller.get()
        meters = () if caller is None else caller.meters
        for meter in meters:
            meter.check_tokens(num_tokens)
        booked = [(meter.tokens, meter.tokens.book(num_tokens)) for meter in meters if meter.tokens is not None]
        reservation = Reservation(0)
        try:
            yield reservation
        finally:
            for window, step in booked:
                window.correct(step, reservation.num_used - num_tokens)

    async def _metered(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        with self.reserve(self._estimate(request)) as reservation:
            async with aclosing(self._manager.stream_request(request)) as events:
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
        sampling = request.resolved_sampling()
        is_given = "max_tokens" in sampling.model_fields_set
        # No answer is longer than a model's context, whatever was asked for.
        longest = max((engine.max_model_len for engine in self._manager.list_engines()), default=0)
        num_output_tokens = min(sampling.max_tokens if is_given else ESTIMATED_OUTPUT_TOKENS, longest)
        return estimate_prompt_tokens(request) + num_output_tokens * sampling.n


def _within_deadline(request: Request, caller: Caller | None) -> Request:
    """The request with the caller's deadline, which every caller has, unless it brings limits of its own."""
    if request.slo is not None or caller is None or caller.slo is None:
        return request
    return request.model_copy(update={"slo": caller.slo})


def _text_of(request: Request) -> str:
    if request.messages is not None:
        return "\n".join(f"{message.role}: {message.text}" for message in request.messages)
    return request.prompt if isinstance(request.prompt, str) else str(request.prompt)
