"""Contrastive search: of the k most probable tokens, the one that repeats the context least.

Su et al., "A Contrastive Framework for Neural Text Generation", arXiv:2202.06417: token v maximises
(1 - alpha) * p(v | context) - alpha * max over context tokens j of cos(h_v, h_j), where h are hidden states after the
final norm and h_v is v's own, from a look-ahead pass. The k look-aheads of a token are probes of the engine, run in one
batch; the winner's probe already holds the candidates of the next token. So a request costs its prompt once, without
reading the prefix cache (all hidden states are needed), and k tokens for each new one, plus what the last incomplete KV
block holds.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import torch
from torch import Tensor

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
from sagellm_protocol.response import FinishReason
from sagellm_protocol.sampling import DEFAULT_CONTRASTIVE_TOP_K, DecodingStrategy


class ContrastiveDecoding(BaseDecodingStrategy):
    """Contrastive search over an engine; `penalty_alpha` is alpha, `top_k` the number of candidates.

    Probabilities are those after logit bias, masks and penalties, at temperature 1.
    """

    strategy = DecodingStrategy.CONTRASTIVE

    async def __call__(self, client: CoreClient, request: EngineCoreRequest) -> AsyncGenerator[EngineCoreOutput, None]:
        """See the base class; yields each token as soon as it is chosen."""
        sampling = request.sampling
        num_candidates = sampling.top_k or DEFAULT_CONTRASTIVE_TOP_K
        timings = ProbeTimings()
        token_ids: list[int] = []
        try:
            outputs = await run_probes(client, [_prompt_probe(request, num_candidates)])
            timings.add(outputs, chose_token=False)
            prompt_logprobs = outputs[0].prompt_logprobs
            context = _Context(_hidden_states(outputs[0]), sampling.max_tokens)
            top = candidates_of(outputs[0])
            while True:
                candidates = top[:num_candidates]
                outputs = await run_probes(client, _look_ahead(request, token_ids, candidates, num_candidates))
                timings.add(outputs, chose_token=True)
                states = torch.stack([_hidden_states(output)[-1] for output in outputs])
                best = context.choose(candidates, states, sampling.penalty_alpha)
                chosen = candidates[best]
                token_ids.append(chosen.token_id)
                finish_reason = _finish_reason(request, token_ids)
                yield EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[chosen.token_id],
                    finish_reason=finish_reason,
                    stop_reason=None if finish_reason is None else stop_reason(request, chosen.token_id),
                    logprobs=_logprobs(chosen, top, sampling.logprobs),
                    num_cached_tokens=timings.total.num_cached_tokens,
                    kv_used_tokens=timings.total.kv_used_tokens,
                    prompt_logprobs=prompt_logprobs if len(token_ids) == 1 else None,
                    metrics=None if finish_reason is None else timings.finish(),
                )
                if finish_reason is not None:
                    return
                context.append(states[best])
                top = candidates_of(outputs[best])
        except ProbeFailed as failure:
            yield failure.output_for(request)


class _Context:
    """Directions of the hidden states of all tokens so far; float64, so that no order of summation changes a choice."""

    def __init__(self, hidden_states: Tensor, max_new_tokens: int) -> None:
        """Start with the prompt's states [P, H]; room for `max_new_tokens` more."""
        num_tokens, hidden_size = hidden_states.shape
        self._directions = torch.empty((num_tokens + max_new_tokens, hidden_size), dtype=torch.float64)
        self._directions[:num_tokens] = _normalised(hidden_states)
        self._num_tokens = num_tokens

    def append(self, hidden_state: Tensor) -> None:
        """Add the state [H] of the token that was chosen."""
        self._directions[self._num_tokens] = _normalised(hidden_state)
        self._num_tokens += 1

    def choose(self, candidates: Sequence[Candidate], hidden_states: Tensor, alpha: float) -> int:
        """Index of the best candidate, the more probable one among equals; `hidden_states` [k, H] are theirs."""
        similarities = _normalised(hidden_states) @ self._directions[: self._num_tokens].T  # [k, context]
        penalties = similarities.amax(-1)
        logprobs = torch.tensor([candidate.logprob for candidate in candidates], dtype=torch.float64)
        scores = (1.0 - alpha) * logprobs.exp() - alpha * penalties
        return int(scores.argmax())


def _normalised(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.to(device="cpu", dtype=torch.float64), dim=-1)


def _prompt_probe(request: EngineCoreRequest, num_candidates: int) -> EngineCoreRequest:
    return probe_request(
        request,
        (),
        "0.0",
        num_logprobs=max(num_candidates, request.sampling.logprobs or 0),
        overrides={"prompt_logprobs": request.sampling.prompt_logprobs},
        read_prefix_cache=False,
        want_hidden_states=True,
    )


def _look_ahead(
    request: EngineCoreRequest, token_ids: Sequence[int], candidates: Sequence[Candidate], num_candidates: int
) -> list[EngineCoreRequest]:
    """One probe for each candidate of the next token."""
    return [
        probe_request(
            request,
            (*token_ids, candidate.token_id),
            f"{len(token_ids) + 1}.{index}",
            num_logprobs=max(num_candidates, request.sampling.logprobs or 0),
            want_hidden_states=True,
        )
        for index, candidate in enumerate(candidates)
    ]


def _hidden_states(output: EngineCoreOutput) -> Tensor:
    assert output.hidden_states is not None, f"{output.request_id} came back without hidden states"
    return output.hidden_states


def _finish_reason(request: EngineCoreRequest, token_ids: Sequence[int]) -> FinishReason | None:
    if token_ids[-1] in stop_ids(request):
        return FinishReason.STOP
    return FinishReason.LENGTH if len(token_ids) >= request.sampling.max_tokens else None


def _logprobs(chosen: Candidate, top: Sequence[Candidate], num_logprobs: int | None) -> list[TokenLogprobs] | None:
    if num_logprobs is None:
        return None
    return [TokenLogprobs(chosen.token_id, chosen.logprob, chosen.rank, tuple(top[:num_logprobs]))]
