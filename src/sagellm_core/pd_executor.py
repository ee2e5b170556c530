"""One request over two engines: the first computes its prompt, the second makes its answer. Holds `PDExecutor`.

Prefill fills a device with work and decode reads memory; where both share an engine, the one holds up the other's
tokens (Zhong et al., "DistServe", OSDI 2024; Patel et al., "Splitwise", ISCA 2024). Here the prefill engine runs the
request until it has a token of each output, which the caller gets at once. Then the prompt's full KV blocks go to the
decode engine's prefix cache, and that engine resumes the request behind the tokens that the caller has. It computes
what lies behind the last full block itself, so there is nothing to agree upon but the bytes of blocks, and a hand-over
that fails or takes too long costs time and nothing else. The tokens are those of one engine, to the bit.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from sagellm_core.llm_engine import LLMEngine
from sagellm_protocol import (
    DecodingStrategy,
    InvalidArgumentError,
    KVErrorCode,
    KVTransferError,
    Request,
    Response,
    ResumePoint,
    SageLLMError,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    TokenizeRequest,
    TokenLogprob,
)
from sagellm_protocol.fields import MAX_SEED

__all__ = ["PDExecutor"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Received:
    """What the caller has got from the prefill engine."""

    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprob]]
    began_at: float
    first_at: float | None = None
    last_at: float = 0.0
    gaps_ms: list[float] = field(default_factory=list)

    @property
    def has_all(self) -> bool:
        """Whether each output has a token."""
        return all(self.token_ids)

    def add(self, delta: StreamEventDelta, now: float) -> None:
        """Note a delta that goes to the caller."""
        self.token_ids[delta.index] += delta.chunk_tokens
        self.logprobs[delta.index] += delta.logprobs or ()
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now


@dataclass(frozen=True, slots=True)
class _Transfer:
    """What a hand-over cost."""

    num_bytes: int = 0
    seconds: float = 0.0


class PDExecutor:
    """Answers requests with `prefill` for their prompts and `decode` for the rest; both run the same model.

    `timeout_s` bounds a hand-over; what takes longer is computed by `decode`. The engines are the caller's, who starts
    and stops them, and may be used by others meanwhile.
    """

    def __init__(
        self,
        prefill: LLMEngine,
        decode: LLMEngine,
        *,
        timeout_s: float = 10.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        if timeout_s <= 0.0:
            raise InvalidArgumentError(f"timeout_s must be above 0 seconds, got {timeout_s}", field="timeout_s")
        self.prefill = prefill
        self.decode = decode
        self._timeout_s = timeout_s
        self._clock = clock

    async def execute(self, request: Request, *, on_prefilled: Callable[[], None] | None = None) -> Response:
        """The whole answer; see `stream`."""
        async with aclosing(self.stream(request, on_prefilled=on_prefilled)) as events:
            async for event in events:
                last = event
        assert isinstance(last, StreamEventEnd), "a stream ends with its end"
        return last.to_response()

    async def stream(
        self, request: Request, *, on_prefilled: Callable[[], None] | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is made, over both engines: one start, deltas, exactly one end.

        What searches its answer (beam, contrastive) or asks for log-probabilities of the prompt is answered by the
        decode engine alone. `on_prefilled` is called when the prefill engine is free of the request. Raises the
        protocol's errors for a request that is wrong.
        """
        if not can_hand_over(request):
            async with aclosing(self.decode.stream(request)) as events:
                async for event in events:
                    yield event
            return
        token_ids = await prompt_token_ids(self.prefill, request)
        num_outputs = request.resolved_sampling().n
        received = _Received([[] for _ in range(num_outputs)], [[] for _ in range(num_outputs)], self._clock())
        seed = _seed(request, self.prefill)
        if not isinstance(request.prompt, list):
            request = request.model_copy(update={"prompt_token_ids": token_ids})
        begun = request.model_copy(update={"resume_from": ResumePoint(seed=seed)})
        async with aclosing(self.prefill.stream(begun)) as events:
            async for event in events:
                if isinstance(event, StreamEventDelta):
                    received.add(event, self._clock())
                yield event
                if isinstance(event, StreamEventEnd):
                    return
                if received.has_all:
                    break
        transfer = await self._hand_over(token_ids, request)
        if on_prefilled is not None:
            on_prefilled()
        point = ResumePoint(output_token_ids=received.token_ids, seed=seed)
        resumed = request.model_copy(update={"resume_from": point})
        async with aclosing(self.decode.stream(resumed)) as events:
            async for event in events:
                if isinstance(event, StreamEventDelta) and event.index == 0:
                    received.gaps_ms.append((self._clock() - received.last_at) * 1e3)
                    received.last_at = self._clock()
                if isinstance(event, StreamEventEnd):
                    yield _joined(event, received, transfer)
                elif not isinstance(event, StreamEventStart):
                    yield event

    async def _hand_over(self, token_ids: list[int], request: Request) -> _Transfer | None:
        """Carry the prompt's blocks over; None where the decode engine has to compute them."""
        began_at = self._clock()
        try:
            num_bytes = await asyncio.wait_for(self._carry(token_ids, request), self._timeout_s)
        except asyncio.TimeoutError:
            error: SageLLMError = KVTransferError(
                f"the hand-over took longer than {self._timeout_s:g} s", kv_code=KVErrorCode.TRANSFER_TIMEOUT.value
            )
        except SageLLMError as failure:
            error = failure
        else:
            return _Transfer(num_bytes, self._clock() - began_at) if num_bytes else None
        logger.warning("request %s is computed again on %s: %s", request.request_id, self.decode.engine_id, error)
        return None

    async def _carry(self, token_ids: list[int], request: Request) -> int:
        """Bytes that were handed over."""
        blocks = await self.prefill.export_prefix(token_ids, cache_salt=request.cache_salt, lora_id=request.lora)
        if blocks is None:
            return 0
        await self.decode.import_prefix(blocks)
        return len(blocks.data)


def can_hand_over(request: Request) -> bool:
    """Whether the request can begin on one engine and go on behind its first token on another."""
    sampling = request.resolved_sampling()
    is_search = sampling.strategy in (DecodingStrategy.BEAM_SEARCH, DecodingStrategy.CONTRASTIVE)
    return not is_search and sampling.prompt_logprobs is None and request.embed is None and request.resume_from is None


async def prompt_token_ids(engine: LLMEngine, request: Request) -> list[int]:
    """The tokens of a request's prompt, as this engine makes them."""
    if isinstance(request.prompt, list):
        return request.prompt
    if request.prompt_token_ids is not None:
        return request.prompt_token_ids
    fields: dict[str, Any] = {
        "prompt": request.prompt,
        "messages": request.messages,
        "tools": request.tools,
        "chat_template_kwargs": request.chat_template_kwargs,
    }
    return await engine.tokenize(
        TokenizeRequest(**{name: value for name, value in fields.items() if value is not None})
    )


def _seed(request: Request, engine: LLMEngine) -> int:
    seed = request.resolved_sampling(engine.config.sampling_defaults).seed
    return secrets.randbelow(MAX_SEED) if seed is None else seed


def _joined(end: StreamEventEnd, received: _Received, transfer: _Transfer | None) -> StreamEventEnd:
    """The decode engine's end with what the prefill engine and the hand-over add to it."""
    outputs = []
    for output, logprobs in zip(end.outputs, received.logprobs, strict=True):
        if output.logprobs is not None:
            entries = [*logprobs, *output.logprobs]
            changes = {"logprobs": entries, "cumulative_logprob": sum(entry.logprob for entry in entries)}
            output = output.model_copy(update=changes)
        outputs.append(output)
    first_at = received.began_at if received.first_at is None else received.first_at
    num_gaps = max(1, len(end.output_tokens) - 1)
    metrics = end.metrics.model_copy(
        update={
            "ttft_ms": (first_at - received.began_at) * 1e3,
            "tpot_ms": (received.last_at - first_at) * 1e3 / num_gaps if len(end.output_tokens) > 1 else 0.0,
            "itl_list": received.gaps_ms,
            "tbt_ms": sum(received.gaps_ms) / len(received.gaps_ms) if received.gaps_ms else 0.0,
            "kv_transfer_count": int(transfer is not None),
            "kv_transfer_bytes": 0 if transfer is None else transfer.num_bytes,
            "kv_transfer_ms": 0.0 if transfer is None else transfer.seconds * 1e3,
        }
    )
    return end.model_copy(update={"outputs": outputs, "metrics": metrics})
