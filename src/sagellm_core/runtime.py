"""Engines with roles behind one door: holds `PDRuntime`, prefill and decode on engines of their own.

It answers requests as an `LLMEngine` does. A long prompt goes to the prefill engine with the fewest prompt tokens in
flight, and its answer is made by the decode engine with the fewest requests; `PDExecutor` is the hand-over between the
two. What is not worth it (short prompts) or cannot be split (searches, vectors) runs on one engine as a whole. For
queues, objectives and engines that may die, the control plane does the same with more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from types import TracebackType

from sagellm_core.llm_engine import LLMEngine
from sagellm_core.pd_executor import PDExecutor, can_hand_over, prompt_token_ids
from sagellm_protocol import (
    InvalidArgumentError,
    ProtocolEnum,
    Request,
    Response,
    StreamEvent,
    UnavailableError,
)

__all__ = ["PDRole", "PDRuntime"]


class PDRole(ProtocolEnum):
    """What an engine is for."""

    PREFILL = "prefill"  # computes prompts
    DECODE = "decode"  # makes answers
    MIXED = "mixed"  # both, and whole requests


@dataclass(slots=True, eq=False)
class _Member:
    """An engine with its role and what it has in flight."""

    engine: LLMEngine
    role: PDRole
    num_requests: int = 0
    num_prompt_tokens: int = 0

    @contextmanager
    def booked(self, num_prompt_tokens: int) -> Iterator[None]:
        """Count a request for the length of the body."""
        self.num_requests += 1
        self.num_prompt_tokens += num_prompt_tokens
        try:
            yield
        finally:
            self.num_requests -= 1
            self.num_prompt_tokens -= num_prompt_tokens


@dataclass(frozen=True, slots=True)
class _Plan:
    """Who computes a prompt of these tokens (None: who decodes), and who decodes."""

    token_ids: Sequence[int]
    prefill: _Member | None
    decode: _Member


class PDRuntime:
    """Prefill, decode and mixed engines of one model; belongs to one event loop.

    >>> async with PDRuntime(prefill=[LLMEngine(config)], decode=[LLMEngine(config)]) as runtime:
    ...     response = await runtime.execute(Request(prompt="What is LLM inference?", max_tokens=64))

    At least one engine must be able to decode (role decode or mixed). Prompts of fewer than `min_handed_over_tokens`
    tokens are not handed over: carrying them would cost more than computing them.
    """

    def __init__(
        self,
        *,
        prefill: Iterable[LLMEngine] = (),
        decode: Iterable[LLMEngine] = (),
        mixed: Iterable[LLMEngine] = (),
        min_handed_over_tokens: int = 256,
        hand_over_timeout_s: float = 10.0,
    ) -> None:
        given = ((PDRole.PREFILL, prefill), (PDRole.DECODE, decode), (PDRole.MIXED, mixed))
        self._members = [_Member(engine, role) for role, engines in given for engine in engines]
        self._min_tokens = min_handed_over_tokens
        self._timeout_s = hand_over_timeout_s
        if all(member.role is PDRole.PREFILL for member in self._members):
            raise InvalidArgumentError(
                "no engine can make answers; give at least one with the role decode or mixed", field="decode"
            )

    @property
    def roles(self) -> dict[str, PDRole]:
        """The engines' roles by their ids."""
        return {member.engine.engine_id: member.role for member in self._members}

    async def start(self) -> None:
        """Load all engines at the same time; if one fails, none is left running."""
        try:
            await asyncio.gather(*(member.engine.start() for member in self._members))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop all engines; requests in flight end with the finish reason `abort`."""
        await asyncio.gather(*(member.engine.stop() for member in self._members))

    async def __aenter__(self) -> PDRuntime:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def execute(self, request: Request) -> Response:
        """Answer a request; see `LLMEngine.execute`."""
        plan = await self._plan(request)
        with self._booked(plan) as end_of_prefill:
            if plan.prefill is None:
                return await plan.decode.engine.execute(request)
            return await self._executor(plan).execute(request, on_prefilled=end_of_prefill)

    async def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is made; see `LLMEngine.stream`."""
        plan = await self._plan(request)
        with self._booked(plan) as end_of_prefill:
            if plan.prefill is None:
                stream = plan.decode.engine.stream(request)
            else:
                stream = self._executor(plan).stream(request, on_prefilled=end_of_prefill)
            async with aclosing(stream) as events:
                async for event in events:
                    yield event

    # ---- choosing -------------------------------------------------------------------------------------

    async def _plan(self, request: Request) -> _Plan:
        ready = [member for member in self._members if member.engine.is_ready]
        deciding = [member for member in ready if member.role is not PDRole.PREFILL]
        if not deciding:
            raise UnavailableError("no engine that makes answers is running; start one, or retry later")
        token_ids: Sequence[int] = ()
        if can_hand_over(request):
            token_ids = await prompt_token_ids(deciding[0].engine, request)
        prefills = [member for member in ready if member.role is PDRole.PREFILL]
        if not prefills or len(token_ids) < max(1, self._min_tokens):
            return _Plan(token_ids, None, _least_busy(deciding, PDRole.MIXED))
        prefill = min(prefills, key=lambda member: member.num_prompt_tokens)
        return _Plan(token_ids, prefill, _least_busy(deciding, PDRole.DECODE))

    def _executor(self, plan: _Plan) -> PDExecutor:
        assert plan.prefill is not None, "a whole request needs no hand-over"
        return PDExecutor(plan.prefill.engine, plan.decode.engine, timeout_s=self._timeout_s)

    @contextmanager
    def _booked(self, plan: _Plan) -> Iterator[Callable[[], None]]:
        """Count the request on its engines; the function that it gives ends the first one's part."""
        with ExitStack() as prefilling, plan.decode.booked(0 if plan.prefill else len(plan.token_ids)):
            if plan.prefill is not None:
                prefilling.enter_context(plan.prefill.booked(len(plan.token_ids)))
            yield prefilling.close


def _least_busy(members: Sequence[_Member], preferred: PDRole) -> _Member:
    """The one with the fewest requests among those of the preferred role, or among all if there is none."""
    meant = [member for member in members if member.role is preferred]
    return min(meant or members, key=lambda member: member.num_requests)
