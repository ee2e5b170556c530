"""Beam search: the most probable continuations as a whole, kept side by side; scores and stopping as in transformers.

A step extends every beam by one token. Each running beam is one probe of the engine (prompt + beam, one new token),
all in one batch, with the prefix cache behind them: with b beams and t tokens the engine computes about b * t tokens,
plus for each beam and step what its last incomplete KV block holds (all of the context if the prefix cache is off).
The answer is known only at the end and is emitted there as one output.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal

from sagellm_core.decoding.base import (
    BaseDecodingStrategy,
    ProbeFailed,
    ProbeTimings,
    candidates_of,
    probe_request,
    run_probes,
    stop_reason,
)
from sagellm_core.engine_core.types import CoreClient, EngineCoreOutput, EngineCoreRequest
from sagellm_core.sampling.logprobs import Candidate, TokenLogprobs
from sagellm_core.sampling.metadata import stop_ids
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.response import FinishReason
from sagellm_protocol.sampling import DecodingStrategy


@dataclass(frozen=True, slots=True)
class Beam:
    """A continuation with the sum of its tokens' log-probabilities."""

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam; `score` = log-probability / length ** length_penalty, the end token counting as one."""

    score: float
    beam: Beam


class BeamSearch:
    """The search itself, without an engine: feed it the candidates of the running beams until it is `done`.

    The rules are those of transformers' `generate(num_beams=k, do_sample=False)`, which follow fairseq and Wu et al.,
    arXiv:1609.08144 (length normalisation): of all extensions the best k * max(2, 1 + number of stop tokens) are looked
    at; those among the best k that end are finished, the best k that don't end go on. Equal scores are ordered by beam,
    then by token id.

    `early_stopping`: True stops at k finished; False when the best running beam, at its present length, is worse than
    all k finished; "never" assumes the length that favours it most.
    """

    def __init__(
        self,
        *,
        num_beams: int,
        max_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> None:
        self.running: list[Beam] = [Beam()]
        self.finished: list[Hypothesis] = []
        self.done = False
        self._num_beams = num_beams
        self._max_tokens = max_tokens
        self._stop_token_ids = stop_token_ids
        self._min_tokens = min_tokens
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._num_extensions = num_beams * max(2, 1 + len(stop_token_ids))
        self._length = 0

    @property
    def num_candidates(self) -> int:
        """How many candidates of each running beam the next `advance` needs to be exact."""
        return self._num_extensions + (len(self._stop_token_ids) if self._length < self._min_tokens else 0)

    def advance(self, tops: Sequence[Sequence[Candidate]], num_logprobs: int = 0) -> None:
        """Extend the running beams; `tops[i]` are the most probable tokens after beam i, best first.

        Every kept token remembers the best `num_logprobs` of its candidates.
        """
        extensions = self._extensions(tops)
        self._length += 1
        ended = [self._ends(token.token_id) for _, _, token, _ in extensions]
        beams = [self._extend(index, token, top[:num_logprobs]) for _, index, token, top in extensions]
        newly = [beam for beam, ends in zip(beams[: self._num_beams], ended, strict=False) if ends]
        self.running = [beam for beam, ends in zip(beams, ended, strict=True) if not ends][: self._num_beams]
        hypotheses = self.finished + [Hypothesis(self._score(beam.logprob), beam) for beam in newly]
        self.finished = sorted(hypotheses, key=lambda item: -item.score)[: self._num_beams]
        self.done = not self.running or not self._may_improve()

    def best(self) -> list[Hypothesis]:
        """What was found, best first: up to `num_beams` hypotheses once `done`."""
        return self.finished

    def _extensions(
        self, tops: Sequence[Sequence[Candidate]]
    ) -> list[tuple[float, int, Candidate, Sequence[Candidate]]]:
        """(summed log-probability, index of the beam, token, its candidates), best first."""
        masked = self._stop_token_ids if self._length < self._min_tokens else frozenset()
        candidates = [
            (beam.logprob + token.logprob, index, token, top)
            for index, (beam, top) in enumerate(zip(self.running, tops, strict=True))
            for token in top
            if token.token_id not in masked
        ]
        return heapq.nsmallest(self._num_extensions, candidates, key=lambda item: (-item[0], item[1], item[2].token_id))

    def _extend(self, index: int, token: Candidate, top: Sequence[Candidate]) -> Beam:
        beam = self.running[index]
        entry = TokenLogprobs(token.token_id, token.logprob, token.rank, tuple(top))
        return Beam((*beam.token_ids, token.token_id), beam.logprob + token.logprob, (*beam.logprobs, entry))

    def _ends(self, token_id: int) -> bool:
        return self._length >= self._max_tokens or token_id in self._stop_token_ids

    def _score(self, logprob: float, length: int | None = None) -> float:
        return logprob / math.pow(length or max(self._length, 1), self._length_penalty)

    def _may_improve(self) -> bool:
        """Whether a running beam may still end better than the worst finished one."""
        if len(self.finished) < self._num_beams:
            return True
        if self._early_stopping is True:
            return False
        favourable = self._early_stopping == "never" and self._length_penalty > 0
        best_possible = self._score(self.running[0].logprob, self._max_tokens if favourable else None)
        return best_possible > self.finished[-1].score


class BeamSearchDecoding(BaseDecodingStrategy):
    """Beam search over an engine: one probe a running beam and step.

    Scores are sums of the model's log-probabilities at temperature 1, after logit bias and penalties if the request has
    any. `request.choice_index` picks the hypothesis: 0 is the best.
    """

    strategy = DecodingStrategy.BEAM_SEARCH

    async def __call__(self, client: CoreClient, request: EngineCoreRequest) -> AsyncGenerator[EngineCoreOutput, None]:
        """See the base class; yields one output, at the end.

        Raises:
            InvalidArgumentError: fewer beams than outputs.
        """
        if request.choice_index >= request.sampling.num_beams:
            raise InvalidArgumentError(
                f"n must be <= num_beams ({request.sampling.num_beams}) with beam search; raise num_beams", field="n"
            )
        try:
            outputs = await self.search(client, request)
        except ProbeFailed as failure:
            yield failure.output_for(request)
            return
        # Fewer hypotheses than asked for exist only where the vocabulary ran out of tokens with a probability.
        yield outputs[min(request.choice_index, len(outputs) - 1)]

    async def search(self, client: CoreClient, request: EngineCoreRequest) -> list[EngineCoreOutput]:
        """All hypotheses, best first, as finished outputs under the request's id.

        Raises:
            ProbeFailed: the engine ended a probe with an error or an abort.
        """
        sampling = request.sampling
        search = BeamSearch(
            num_beams=sampling.num_beams,
            max_tokens=sampling.max_tokens,
            stop_token_ids=stop_ids(request),
            min_tokens=sampling.min_tokens - request.sampled_prefix_len,
            length_penalty=sampling.length_penalty,
            early_stopping=sampling.early_stopping,
        )
        timings = ProbeTimings()
        prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
        for step in range(sampling.max_tokens):
            outputs = await run_probes(client, _probes(request, search, step))
            timings.add(outputs, chose_token=True)
            prompt_logprobs = outputs[0].prompt_logprobs if step == 0 else prompt_logprobs
            search.advance([candidates_of(output) for output in outputs], sampling.logprobs or 0)
            if search.done:
                break
        metrics = timings.finish()
        return [
            EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=list(beam.token_ids),
                finish_reason=FinishReason.STOP if beam.token_ids[-1] in stop_ids(request) else FinishReason.LENGTH,
                stop_reason=stop_reason(request, beam.token_ids[-1]),
                logprobs=None if sampling.logprobs is None else list(beam.logprobs),
                num_cached_tokens=metrics.num_cached_tokens,
                kv_used_tokens=metrics.kv_used_tokens,
                prompt_logprobs=prompt_logprobs,
                metrics=metrics,
            )
            for beam in (hypothesis.beam for hypothesis in search.best())
        ]


def _probes(request: EngineCoreRequest, search: BeamSearch, step: int) -> list[EngineCoreRequest]:
    is_first = step == 0
    overrides = {
        # The search itself masks and recognises end tokens, so that scores are not renormalised without them.
        "min_tokens": 0,
        "ignore_eos": True,
        "stop_token_ids": (),
        "prompt_logprobs": request.sampling.prompt_logprobs if is_first else None,
    }
    return [
        probe_request(
            request,
            beam.token_ids,
            f"{step}.{index}",
            num_logprobs=search.num_candidates,
            overrides=overrides,
            read_prefix_cache=request.read_prefix_cache or not is_first,
        )
        for index, beam in enumerate(search.running)
    ]
