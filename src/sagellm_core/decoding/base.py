"""What decoding strategies share: the base class, the n outputs of a request, sub-requests that look one token ahead.

A search strategy asks the engine for single tokens: a probe is the request's prompt plus a continuation, one new
token, with the log-probabilities of the best candidates. Probes of one step run together in one batch, and the prefix
cache makes their common context cheap. Leaving a strategy early (closing its generator, cancelling its task) aborts
the probes.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sagellm_core.engine_core.types import CoreClient, EngineCoreOutput, EngineCoreRequest, RequestTimings
from sagellm_core.sampling.metadata import stop_ids
from sagellm_core.sampling.rng import derive_seed
from sagellm_protocol.errors import InternalError
from sagellm_protocol.response import FinishReason
from sagellm_protocol.sampling import DecodingStrategy

if TYPE_CHECKING:
    from sagellm_core.sampling.logprobs import Candidate, TokenLogprobs


class BaseDecodingStrategy(ABC):
    """One way to turn a request into tokens. Instances keep nothing between calls."""

    strategy: ClassVar[DecodingStrategy]

    @abstractmethod
    def __call__(self, client: CoreClient, request: EngineCoreRequest) -> AsyncGenerator[EngineCoreOutput, None]:
        """Run `request` over `client`: outputs under the request's id, the last one with a finish reason.

        The outputs hold all tokens of the answer, from the first on, those in `request.resumed_token_ids` too.
        Closing the generator early aborts whatever runs for it.
        """


async def behind_resumed(
    outputs: AsyncGenerator[EngineCoreOutput, None], request: EngineCoreRequest
) -> AsyncGenerator[EngineCoreOutput, None]:
    """A request's outputs with its resumed tokens before them, for strategies that go on behind these.

    A resumed token that may have ended the text comes with the next output, which says whether it did.
    """
    resumed = request.resumed_token_ids
    held = len(resumed) > 0 and resumed[-1] in stop_ids(request)
    async with aclosing(outputs):
        yield EngineCoreOutput(request.request_id, resumed[: len(resumed) - held])
        async for output in outputs:
            yield replace(output, new_token_ids=[resumed[-1], *output.new_token_ids]) if held else output
            held = False


def child_request(request: EngineCoreRequest, index: int) -> EngineCoreRequest:
    """Output `index` of the `sampling.n` outputs of `request`, as a request of its own.

    It has the id `<id>/<index>` and a seed derived from the request's, so that each output is reproducible by itself.
    Output 0 draws the same tokens as the request would with n = 1. A request with n = 1 is its own only child.
    """
    if request.sampling.n == 1:
        return request
    return replace(
        request,
        request_id=f"{request.request_id}/{index}",
        sampling=request.sampling.model_copy(update={"n": 1}),
        seed=derive_seed(request.seed, index),
        choice_index=index,
    )


def probe_request(
    request: EngineCoreRequest,
    continuation: Sequence[int],
    name: str,
    *,
    num_logprobs: int,
    overrides: dict[str, Any] | None = None,
    read_prefix_cache: bool = True,
    want_hidden_states: bool = False,
) -> EngineCoreRequest:
    """A sub-request `<id>/<name>` for the one token after prompt + `continuation`.

    It reports the `num_logprobs` best candidates after bias, masks and penalties (more than the API's limit is fine:
    validation is for requests from outside). `overrides` change further sampling parameters.
    """
    one_token = {
        "strategy": DecodingStrategy.GREEDY,
        "temperature": 0.0,
        "num_beams": 1,
        "max_tokens": 1,
        "n": 1,
        "logprobs": num_logprobs,
        "prompt_logprobs": None,
    }
    return replace(
        request,
        request_id=f"{request.request_id}/{name}",
        prompt_token_ids=(*request.prompt_token_ids, *continuation),
        sampling=request.sampling.model_copy(update={**one_token, **(overrides or {})}),
        sampled_prefix_len=request.sampled_prefix_len + len(continuation),
        resumed_token_ids=(),
        processed_logprobs=True,
        read_prefix_cache=read_prefix_cache,
        want_hidden_states=want_hidden_states,
    )


class ProbeFailed(Exception):
    """A probe ended with an error or was aborted; `output` says how."""

    def __init__(self, output: EngineCoreOutput) -> None:
        super().__init__(output.request_id)
        self.output = output

    def output_for(self, request: EngineCoreRequest) -> EngineCoreOutput:
        """The same end for the request that the probe was made for."""
        return EngineCoreOutput(request.request_id, finish_reason=self.output.finish_reason, error=self.output.error)


async def run_probes(client: CoreClient, probes: Sequence[EngineCoreRequest]) -> list[EngineCoreOutput]:
    """Run the probes at the same time; their whole outputs, in order.

    Raises:
        ProbeFailed: one of them didn't end by itself; the others are aborted.
    """
    tasks = [asyncio.ensure_future(_run_probe(client, probe)) for probe in probes]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run_probe(client: CoreClient, probe: EngineCoreRequest) -> EngineCoreOutput:
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    async with aclosing(client.submit(probe)) as outputs:
        async for output in outputs:
            token_ids += output.new_token_ids
            logprobs += output.logprobs or ()
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise ProbeFailed(output)
            if output.finished:
                return replace(output, new_token_ids=token_ids, logprobs=logprobs)
    raise InternalError(f"the engine ended request {probe.request_id} without a finish reason")


def candidates_of(output: EngineCoreOutput) -> Sequence[Candidate]:
    """The most probable tokens that a probe found, best first; at least one.

    Raises:
        InternalError: the model gave no token a probability (its logits are not numbers).
    """
    if not output.logprobs or not output.logprobs[0].top:
        raise InternalError(f"the model's logits for request {output.request_id} hold no token with a probability")
    return output.logprobs[0].top


def stop_reason(request: EngineCoreRequest, token_id: int) -> int | None:
    """What a request that ended with `token_id` reports: the id if it is one of the caller's stop tokens."""
    ended_by_eos = token_id in request.eos_token_ids and not request.sampling.ignore_eos
    return token_id if token_id in request.sampling.stop_token_ids and not ended_by_eos else None


@dataclass(slots=True)
class ProbeTimings:
    """The timings of a request that is made of probes, summed up from theirs.

    KV usage is the peak over the steps of what a step's probes held together; a block that several probes share counts
    for each of them.
    """

    total: RequestTimings = field(default_factory=RequestTimings)
    _is_first: bool = True

    def add(self, outputs: Sequence[EngineCoreOutput], *, chose_token: bool) -> None:
        """Take in one step's probes; `chose_token` says whether the step decided a token of the request."""
        parts = [output.metrics for output in outputs if output.metrics is not None]
        if not parts:
            return
        total = self.total
        if self._is_first:
            first = parts[0]
            total.queued_at, total.scheduled_at = first.queued_at, first.scheduled_at
            total.num_cached_tokens = first.num_cached_tokens
            self._is_first = False
        ends = [part.last_token_at for part in parts if part.last_token_at is not None]
        if chose_token and ends:
            total.last_token_at = max(ends)
            total.first_token_at = total.first_token_at or total.last_token_at
        total.evict_count += sum(part.evict_count for part in parts)
        total.evict_ms += sum(part.evict_ms for part in parts)
        total.num_preemptions += sum(part.num_preemptions for part in parts)
        total.kv_used_tokens = max(total.kv_used_tokens, sum(part.kv_used_tokens for part in parts))
        total.kv_used_bytes = max(total.kv_used_bytes, sum(part.kv_used_bytes for part in parts))

    def finish(self) -> RequestTimings:
        """The sums, with the durations that follow from them."""
        total = self.total
        if total.scheduled_at is not None and total.first_token_at is not None and total.last_token_at is not None:
            total.prefill_ms = (total.first_token_at - total.scheduled_at) * 1e3
            total.decode_ms = (total.last_token_at - total.first_token_at) * 1e3
        return total
