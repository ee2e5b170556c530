"""What the sampler must know about the rows of one step: `SamplingRow` for one, `SamplingMetadata` for all.

A row is small and picklable: token ids travel only with requests whose penalties read them. The metadata holds arrays,
built once a step; edits to logits are lists of (row, token, amount), never dense [rows, vocabulary] tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sagellm_core.engine_core.types import EngineCoreRequest
from sagellm_core.sampling import rng
from sagellm_protocol.sampling import DecodingStrategy, SamplingParams

if TYPE_CHECKING:
    from sagellm_core.structured import GrammarMatcher

# Below this a division would leave float32; the limit of temperature -> 0 is the most probable token anyway.
MIN_TEMPERATURE = 1e-5
_GREEDY = (0.0, 0.0, 1.0, 0.0, 0.5)  # a row of SamplingMetadata.wanted


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits: whose it is and how its token is chosen.

    `position` is the index in prompt + output of the token to draw. `banned_token_ids` get no probability (stop tokens
    while `min_tokens` is not reached); with `allowed_token_ids` all others get none. `mask` allows the tokens whose
    bits are set (see `GrammarMatcher.allowed`) and wins over all else. `processed_logprobs` reports the distribution
    after bias, masks and penalties instead of the model's own; `fallback_token_id` is a second token to report.
    """

    sampling: SamplingParams
    seed: int
    position: int
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    banned_token_ids: Sequence[int] = ()
    allowed_token_ids: Sequence[int] | None = None
    processed_logprobs: bool = False
    mask: NDArray[np.int32] | None = None
    fallback_token_id: int | None = None

    @classmethod
    def from_request(
        cls, request: EngineCoreRequest, token_ids: Sequence[int], matcher: GrammarMatcher | None = None
    ) -> SamplingRow:
        """The row that draws the token after `token_ids`, which is the request's prompt and output so far."""
        sampling = request.sampling
        num_prompt_tokens = len(request.prompt_token_ids) - request.sampled_prefix_len
        prompt: Sequence[int] = ()
        output: Sequence[int] = ()
        banned: Sequence[int] = ()
        if _reads_token_ids(sampling):
            prompt, output = tuple(token_ids[:num_prompt_tokens]), tuple(token_ids[num_prompt_tokens:])
        if len(token_ids) - num_prompt_tokens < sampling.min_tokens:
            banned = tuple(sorted(stop_ids(request)))
        mask, fallback = None, None
        if matcher is not None:
            held_back = {*banned, *(request.eos_token_ids if sampling.ignore_eos else ())}
            mask, banned = _mask_without(matcher.allowed, held_back) if held_back else matcher.allowed, ()
            fallback = None if sampling.logprobs is None else matcher.fallback_token_id
        return cls(
            sampling=sampling,
            seed=request.seed,
            position=len(token_ids),
            prompt_token_ids=prompt,
            output_token_ids=output,
            banned_token_ids=banned,
            processed_logprobs=request.processed_logprobs,
            mask=mask,
            fallback_token_id=fallback,
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken; the temperature matters to strategy SAMPLING alone."""
        sampling = self.sampling
        return sampling.strategy is not DecodingStrategy.SAMPLING or sampling.temperature < MIN_TEMPERATURE

    @property
    def edits_logits(self) -> bool:
        """Whether the token is chosen from other logits than the model's."""
        sampling = self.sampling
        return bool(
            self.banned_token_ids
            or sampling.logit_bias
            or self.allowed_token_ids is not None
            or self.mask is not None
            or _reads_token_ids(sampling)
        )

    @property
    def takes_most_probable(self) -> bool:
        """Whether the row wants nothing but its most probable token: no edits of logits, no log-probabilities."""
        return self.is_greedy and self.sampling.logprobs is None and not self.edits_logits


def _mask_without(mask: NDArray[np.int32], token_ids: Iterable[int]) -> NDArray[np.int32]:
    """The mask less some tokens, unless they are all that it allows."""
    words = mask.view(np.uint32).copy()
    for token_id in token_ids:
        words[token_id >> 5] &= ~np.uint32(1 << (token_id & 31))
    return words.view(np.int32) if words.any() else mask


def stop_ids(request: EngineCoreRequest) -> frozenset[int]:
    """The token ids that end the request: the model's own (unless `ignore_eos`) and the caller's."""
    eos = frozenset() if request.sampling.ignore_eos else request.eos_token_ids
    return eos.union(request.sampling.stop_token_ids)


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Amounts for single logits: entry i belongs to logit [rows[i], token_ids[i]]."""

    rows: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    amounts: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)


class Report(NamedTuple):
    """A row whose log-probabilities are wanted, with how many of the most probable tokens."""

    row: int
    num_top: int
    processed: bool


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """What is wanted of the rows of one step; R rows, in the order of the logits."""

    wanted: NDArray[np.float64]  # [R, 5]; see `sagellm_backend.reference.sample_tokens`
    reports: list[Report]
    bias: LogitEdits  # added
    banned: LogitEdits  # set to -inf
    allowed: dict[int, NDArray[np.int64]]  # row -> the only token ids with a probability
    repetition: LogitEdits  # penalty of each prompt and output token; duplicates are equal
    additive: LogitEdits  # presence and frequency penalty of each distinct output token, subtracted
    masks: dict[int, NDArray[np.int32]]  # row -> bits of the tokens with a probability
    fallbacks: dict[int, int]  # row -> a token to report beside the one drawn

    @property
    def edits_logits(self) -> bool:
        """Whether any row's logits differ from the model's."""
        edits = (self.bias, self.banned, self.repetition, self.additive)
        return bool(self.allowed) or bool(self.masks) or any(len(edit) for edit in edits)

    @classmethod
    def from_requests(cls, rows: Sequence[SamplingRow]) -> SamplingMetadata:
        """Gather the rows' parameters; no row's arrays depend on another row."""
        edited = [(i, row) for i, row in enumerate(rows) if row.edits_logits]
        return cls(
            wanted=_wanted(rows),
            reports=[
                Report(i, row.sampling.logprobs, row.processed_logprobs)
                for i, row in enumerate(rows)
                if row.sampling.logprobs is not None
            ],
            bias=_bias(edited),
            banned=_edits((i, row.banned_token_ids, 0.0) for i, row in edited),
            allowed={
                i: np.asarray(row.allowed_token_ids, dtype=np.int64)
                for i, row in edited
                if row.allowed_token_ids is not None
            },
            repetition=_repetition(edited),
            additive=_additive(edited),
            masks={i: row.mask for i, row in edited if row.mask is not None},
            fallbacks={i: row.fallback_token_id for i, row in edited if row.fallback_token_id is not None},
        )


def _wanted(rows: Sequence[SamplingRow]) -> NDArray[np.float64]:
    drawn = [row for row in rows if not row.is_greedy]
    numbers = iter(rng.uniform_list([row.seed for row in drawn], [row.position for row in drawn]))
    return np.array(
        [
            _GREEDY
            if row.is_greedy
            else (row.sampling.temperature, row.sampling.top_k, row.sampling.top_p, row.sampling.min_p, next(numbers))
            for row in rows
        ],
        dtype=np.float64,
    ).reshape(-1, len(_GREEDY))


def _reads_token_ids(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def _edits(parts: Iterable[tuple[int, Sequence[int], float]]) -> LogitEdits:
    """One amount for many tokens of a row, for several rows."""
    filled = [(row, np.asarray(ids, dtype=np.int64), amount) for row, ids, amount in parts if len(ids)]
    if not filled:
        return _NO_EDITS
    counts = [len(ids) for _, ids, _ in filled]
    return LogitEdits(
        np.repeat(np.array([row for row, _, _ in filled], dtype=np.int64), counts),
        np.concatenate([ids for _, ids, _ in filled]),
        np.repeat(np.array([amount for _, _, amount in filled], dtype=np.float32), counts),
    )


def _bias(rows: Sequence[tuple[int, SamplingRow]]) -> LogitEdits:
    entries = [(i, *entry) for i, row in rows for entry in (row.sampling.logit_bias or {}).items()]
    if not entries:
        return _NO_EDITS
    return LogitEdits(
        np.array([row for row, _, _ in entries], dtype=np.int64),
        np.array([token_id for _, token_id, _ in entries], dtype=np.int64),
        np.array([amount for _, _, amount in entries], dtype=np.float32),
    )


def _repetition(rows: Sequence[tuple[int, SamplingRow]]) -> LogitEdits:
    return _edits(
        (i, ids, row.sampling.repetition_penalty)
        for i, row in rows
        if row.sampling.repetition_penalty != 1.0
        for ids in (row.prompt_token_ids, row.output_token_ids)
    )


def _additive(rows: Sequence[tuple[int, SamplingRow]]) -> LogitEdits:
    parts: list[tuple[int, NDArray[np.int64], NDArray[np.float32]]] = []
    for i, row in rows:
        presence, frequency = row.sampling.presence_penalty, row.sampling.frequency_penalty
        if (presence or frequency) and len(row.output_token_ids):
            ids, counts = np.unique(np.asarray(row.output_token_ids, dtype=np.int64), return_counts=True)
            parts.append((i, ids, (presence + frequency * counts).astype(np.float32)))
    if not parts:
        return _NO_EDITS
    return LogitEdits(
        np.repeat(np.array([i for i, _, _ in parts], dtype=np.int64), [len(ids) for _, ids, _ in parts]),
        np.concatenate([ids for _, ids, _ in parts]),
        np.concatenate([amounts for _, _, amounts in parts]),
    )


_NO_EDITS = LogitEdits(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
