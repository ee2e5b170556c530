"""An engine that says what a test wants, at the pace it wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fake_engine import FakeEngine
from sagellm_protocol import (
    CompletionOutput,
    FinishReason,
    Metrics,
    Request,
    Response,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    Usage,
)

PIECE = 4  # characters a token


class ScriptedEngine(FakeEngine):
    """Answers with `script[prompt]`, by default the prompt itself, a token of some characters every `pace_s`.

    Where `holds_after` is set, it waits for `gate` after so many tokens. `endless` as a prompt is answered without end;
    `wait`, `fail` and `refuse` do what they do in a `FakeEngine`.
    """

    def __init__(self, script: dict[str, str] | None = None, *, pace_s: float = 0.002, **options: Any) -> None:
        super().__init__(**options)
        self.script = script or {}
        self.pace_s = pace_s
        self.holds_after: int | None = None

    async def stream(self, request: Request, /) -> AsyncGenerator[StreamEvent, None]:
        prompt = str(request.messages[-1].content) if request.messages else ""
        if prompt in ("wait", "fail", "refuse"):
            async for event in super().stream(request):
                yield event
            return
        self.requests.append(request)
        names = {"request_id": request.request_id, "trace_id": request.trace_id, "engine_id": self.engine_id}
        said: list[str] = []
        is_done = False
        try:
            yield StreamEventStart(prompt_tokens=len(prompt.split()), **names)
            for piece in self._pieces(prompt):
                await asyncio.sleep(self.pace_s)
                if len(said) == self.holds_after:
                    await self.gate.wait()
                said.append(piece)
                yield StreamEventDelta(chunk=piece, chunk_tokens=[1], **names)
            is_done = True
            yield StreamEventEnd.of(self._answer(request, said, names))
        finally:
            if not is_done:
                self.cancelled.append(request.request_id)

    def _pieces(self, prompt: str) -> Iterator[str]:
        while prompt == "endless":
            yield "on and on "
        text = self.script.get(prompt, prompt)
        for start in range(0, len(text), PIECE):
            yield text[start : start + PIECE]

    def _answer(self, request: Request, said: list[str], names: Any) -> Response:
        output = CompletionOutput(
            index=0, text="".join(said), token_ids=[1] * len(said), finish_reason=FinishReason.STOP
        )
        usage = Usage(prompt_tokens=7, completion_tokens=len(said))
        # The seconds that a busy machine adds are not seen beside it.
        metrics = Metrics(ttft_ms=12_000.0, tpot_ms=3.0)
        return Response.of([output], model=request.model, metrics=metrics, usage=usage, **names)
