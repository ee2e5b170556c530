"""An engine client without an engine: a function from token ids to logits and hidden states, a token at a time."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sagellm_core.engine_core.types import EngineCoreOutput, EngineCoreRequest, RequestTimings
from sagellm_core.sampling import Sampler, SamplingMetadata, SamplingRow
from sagellm_protocol import FinishReason, InternalError

# Token ids -> (logits [V] of the next token, hidden states [number of tokens, H]).
LanguageModel = Callable[[Sequence[int]], tuple[Tensor, Tensor]]


def hash_model(vocab_size: int = 12, hidden_size: int = 6, spread: float = 1.5) -> LanguageModel:
    """Logits and hidden state of a token are noise seeded with a hash of its last three tokens."""

    def run(token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        states = [_noise(token_ids[: i + 1][-3:], vocab_size + hidden_size) for i in range(len(token_ids))]
        logits = torch.from_numpy((states[-1][:vocab_size] * spread).astype(np.float32))
        hidden = torch.from_numpy(np.stack(states)[:, vocab_size:].astype(np.float32))
        return logits, hidden

    return run


def _noise(token_ids: Sequence[int], size: int) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(np.asarray(token_ids, dtype=np.int64).tobytes())).normal(size=size)


class ToyEngine:
    """A `CoreClient`. Remembers what it was asked (`requests`) and what still runs (`running`).

    `fail_on` names request ids that end with an error; `hang_on` ids that never answer. `num_cached` tokens of every
    prompt that may come from the prefix cache count as cached: their hidden states are missing from the output.
    """

    def __init__(
        self, model: LanguageModel, *, fail_on: str | None = None, hang_on: str | None = None, num_cached: int = 0
    ) -> None:
        self.model = model
        self.requests: list[EngineCoreRequest] = []
        self.running: set[str] = set()
        self.max_running = 0
        self._fail_on = fail_on
        self._hang_on = hang_on
        self._num_cached = num_cached
        self._now = 0.0

    async def submit(self, request: EngineCoreRequest) -> AsyncGenerator[EngineCoreOutput, None]:
        assert request.request_id not in {known.request_id for known in self.requests}, "an id is used twice"
        self.requests.append(request)
        self.running.add(request.request_id)
        self.max_running = max(self.max_running, len(self.running))
        try:
            await asyncio.sleep(0)
            if request.request_id == self._hang_on:
                await asyncio.Event().wait()
            if request.request_id == self._fail_on:
                error = InternalError("the toy broke").to_error()
                yield EngineCoreOutput(request.request_id, finish_reason=FinishReason.ERROR, error=error)
                return
            for output in self._run(request):
                yield output
        finally:
            self.running.discard(request.request_id)

    def _run(self, request: EngineCoreRequest) -> list[EngineCoreOutput]:
        token_ids = list(request.prompt_token_ids)
        num_cached = min(self._num_cached, len(token_ids) - 1) if request.read_prefix_cache else 0
        timings = RequestTimings(queued_at=self._tick(), scheduled_at=self._tick(), num_cached_tokens=num_cached)
        outputs: list[EngineCoreOutput] = []
        while not outputs or not outputs[-1].finished:
            logits, hidden = self.model(token_ids)
            sampled = Sampler()(
                logits[None].clone(), SamplingMetadata.from_requests([SamplingRow.from_request(request, token_ids)])
            )
            token_ids.append(sampled.token_ids[0])
            timings.last_token_at = self._tick()
            timings.first_token_at = timings.first_token_at or timings.last_token_at
            timings.kv_used_tokens = len(token_ids) - 1
            reason = _finish_reason(request, token_ids)
            entry = sampled.logprobs[0]
            outputs.append(
                EngineCoreOutput(
                    request.request_id,
                    [token_ids[-1]],
                    reason,
                    logprobs=None if entry is None else [entry],
                    hidden_states=hidden[num_cached:] if reason and request.want_hidden_states else None,
                    num_cached_tokens=num_cached,
                    metrics=timings if reason else None,
                )
            )
        return outputs

    def _tick(self) -> float:
        self._now += 1.0
        return self._now


def _finish_reason(request: EngineCoreRequest, token_ids: Sequence[int]) -> FinishReason | None:
    sampling = request.sampling
    if token_ids[-1] in request.eos_token_ids and not sampling.ignore_eos:
        return FinishReason.STOP
    if token_ids[-1] in sampling.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(token_ids) - len(request.prompt_token_ids) >= sampling.max_tokens else None


async def collect(outputs: AsyncGenerator[EngineCoreOutput, None]) -> list[EngineCoreOutput]:
    """All outputs of a request."""
    return [output async for output in outputs]


def tokens_of(outputs: Sequence[EngineCoreOutput]) -> list[int]:
    """The tokens of all outputs, in order."""
    return [token_id for output in outputs for token_id in output.new_token_ids]
