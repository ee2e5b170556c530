"""The sampler: logits of a step in, one token for each row out, vectorised over the rows.

Order of processing: logit bias -> banned and allowed tokens -> repetition, presence and frequency penalties ->
temperature -> top-k -> top-p -> min-p -> inverse CDF with one uniform of (seed, position). Greedy rows stop after the
penalties. A row's path depends on its own parameters and logits alone, hence so does its token, bit for bit.

Rows are served in up to four groups, by what they cost: greedy rows by an argmax; rows without top-k and top-p by the
CDF in order of token ids, unsorted; rows with a small top-k or a narrow nucleus by their most probable tokens; what
is left (wide nucleus, large top-k, ties at the cut) by sorting the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sagellm_core.sampling import rng
from sagellm_core.sampling.distribution import (
    argmax_rows,
    invert_sorted,
    softmax_weights,
    ties_at,
    top_candidates,
)
from sagellm_core.sampling.filters import nucleus_size, num_kept
from sagellm_core.sampling.logprobs import TokenLogprobs, gather_logprobs
from sagellm_core.sampling.metadata import NO_LOGPROBS, SamplingMetadata
from sagellm_core.sampling.penalties import process_logits

_LARGEST_TOP_K = 1024  # above, sorting the row is as fast
_NUCLEUS_CANDIDATES = 128  # holds the nucleus of nearly all rows of a trained model


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One token for each row, and log-probabilities for the rows that asked."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are drawn in the same way; n rows, tensors on the logits' device."""

    rows: NDArray[np.int64]  # [n] their places in the batch
    logits: Tensor  # [n, V]
    uniforms: Tensor  # [n] float64
    temperature: Tensor  # [n] float32
    top_k: Tensor  # [n] int64; 0 = off
    top_p: Tensor  # [n] float64
    min_p: Tensor  # [n] float64

    def select(self, keep: Tensor) -> _Group:
        """The rows where `keep` [n] bool is set."""
        if bool(keep.all()):
            return self
        return _Group(
            self.rows[keep.cpu().numpy()],
            self.logits[keep],
            self.uniforms[keep],
            self.temperature[keep],
            self.top_k[keep],
            self.top_p[keep],
            self.min_p[keep],
        )


class Sampler:
    """Callable, without a state: the same logits and metadata always give the same tokens."""

    def __call__(self, logits: Tensor, meta: SamplingMetadata) -> SamplerOutput:
        """Choose a token for each row of `logits` [R, V] float32, which are overwritten.

        Log-probabilities are those of the model itself (log_softmax of the logits as they came, like the OpenAI API and
        vLLM's default), except for rows with `processed_logprobs`: bias, masks and penalties applied, no temperature.
        A row of NaN or of -inf alone gets some token of the vocabulary and harms no other row.
        """
        wanted = np.flatnonzero(meta.num_logprobs != NO_LOGPROBS)
        reported = _logits_to_report(logits, meta, wanted)
        process_logits(logits, meta)
        reported = _add_processed(reported, logits, meta, wanted)
        token_ids = self._choose(logits, meta)
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        if len(wanted):
            found = gather_logprobs(reported, [token_ids[row] for row in wanted], meta.num_logprobs[wanted].tolist())
            for row, entry in zip(wanted.tolist(), found, strict=True):
                logprobs[row] = entry
        return SamplerOutput(token_ids, logprobs)

    def _choose(self, logits: Tensor, meta: SamplingMetadata) -> list[int]:
        if meta.is_greedy.all():
            best: list[int] = argmax_rows(logits).tolist()
            return best
        token_ids = np.empty(len(logits), dtype=np.int64)
        greedy = np.flatnonzero(meta.is_greedy)
        if len(greedy):
            token_ids[greedy] = argmax_rows(_rows_of(logits, greedy)).cpu().numpy()
        vocab_size = logits.shape[-1]
        top_k = np.where(meta.top_k < vocab_size, meta.top_k, 0)
        cut = (top_k > 0) | (meta.top_p < 1.0)
        large = top_k > _LARGEST_TOP_K
        drawn = ~meta.is_greedy
        self._draw_unsorted(_group(logits, meta, top_k, drawn & ~cut), token_ids)
        rest = self._draw_from_candidates(_group(logits, meta, top_k, drawn & cut & ~large), token_ids)
        self._draw_sorted(rest, token_ids)
        self._draw_sorted(_group(logits, meta, top_k, drawn & large), token_ids)
        chosen: list[int] = token_ids.tolist()
        return chosen

    def _draw_unsorted(self, group: _Group, token_ids: NDArray[np.int64]) -> None:
        """Temperature and min-p alone: no order is needed."""
        if not len(group.rows):
            return
        min_p = group.min_p if bool(group.min_p.any()) else None
        weights = softmax_weights(group.logits, group.temperature, min_p)
        # The clamp is for rows of NaN alone.
        token_ids[group.rows] = weights.invert(group.uniforms).clamp_(max=group.logits.shape[-1] - 1).cpu().numpy()

    def _draw_from_candidates(self, group: _Group, token_ids: NDArray[np.int64]) -> _Group:
        """Top-k, top-p and min-p over the most probable tokens; returns the rows that those don't decide."""
        if not len(group.rows):
            return group
        vocab_size = group.logits.shape[-1]
        has_top_k = group.top_k > 0
        count = torch.where(has_top_k, group.top_k, min(_NUCLEUS_CANDIDATES, vocab_size))
        # One more than needed shows ties at the cut.
        values, ids = top_candidates(group.logits, min(int(count.max()) + 1, vocab_size))
        columns = torch.arange(values.shape[-1], device=values.device)
        scaled = (values.double() - values[:, :1].double()) / group.temperature[:, None].double()
        weights = scaled.exp().masked_fill_(columns >= count[:, None], 0.0)
        cumulative = weights.cumsum(-1)
        total = cumulative.gather(1, count[:, None] - 1)[:, 0]
        by_nucleus = ~has_top_k
        if bool(by_nucleus.any()):
            part = group.select(by_nucleus)
            total[by_nucleus] = softmax_weights(part.logits, part.temperature).total
        nucleus = nucleus_size(cumulative, total, group.top_p)
        decided = (has_top_k | (nucleus <= count)) & ~ties_at(values, count)
        kept = num_kept(weights, cumulative, count, total, group.top_p, group.min_p)
        chosen = ids.gather(1, invert_sorted(cumulative, kept, group.uniforms)[:, None])[:, 0]
        token_ids[group.rows] = chosen.cpu().numpy()  # the undecided are overwritten by whoever decides them
        return group.select(~decided)

    def _draw_sorted(self, group: _Group, token_ids: NDArray[np.int64]) -> None:
        """Any filters, over all tokens in order of falling probability, equals in order of their ids."""
        if not len(group.rows):
            return
        values = _sort_descending(group.logits)
        falling = -values  # searchsorted wants rising values
        weights = ((values - values[:, :1]) / group.temperature[:, None]).exp_()
        cumulative = weights.cumsum(-1, dtype=torch.float64)
        kth = falling.gather(1, (group.top_k - 1).clamp(min=0)[:, None])
        with_ties = torch.searchsorted(falling, kth, right=True)[:, 0]
        after_top_k = torch.where(group.top_k > 0, with_ties, values.shape[-1])
        total = cumulative.gather(1, after_top_k[:, None] - 1)[:, 0]
        kept = num_kept(weights, cumulative, after_top_k, total, group.top_p, group.min_p)
        place = invert_sorted(cumulative, kept, group.uniforms)[:, None]
        value = falling.gather(1, place)
        place_among_equals = place - torch.searchsorted(falling, value)
        for i, row in enumerate(group.rows):
            equals = torch.nonzero(group.logits[i] == -value[i])[:, 0]
            token_ids[row] = int(equals[place_among_equals[i]]) if len(equals) else 0  # none equals NaN


def _logits_to_report(logits: Tensor, meta: SamplingMetadata, wanted: NDArray[np.int64]) -> Tensor:
    """The rows of `logits` whose log-probabilities are wanted, safe from edits that are still to come."""
    if not len(wanted):
        return logits[:0]
    picked = _rows_of(logits, wanted)
    return picked.clone() if picked is logits and meta.edits_logits else picked


def _add_processed(reported: Tensor, logits: Tensor, meta: SamplingMetadata, wanted: NDArray[np.int64]) -> Tensor:
    """Put the edited logits in the place of the model's own where a row wants to see those."""
    processed = np.flatnonzero(meta.processed_logprobs[wanted])
    if len(processed) and meta.edits_logits:
        index = torch.from_numpy(processed).to(logits.device)
        reported[index] = _rows_of(logits, wanted[processed])
    return reported


def _rows_of(logits: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """`logits` at `rows` (rising): itself if those are all, else a copy."""
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, torch.from_numpy(rows).to(logits.device))


def _group(logits: Tensor, meta: SamplingMetadata, top_k: NDArray[np.int64], chosen: NDArray[np.bool_]) -> _Group:
    rows = np.flatnonzero(chosen)
    uniforms = rng.uniforms(meta.seeds[rows], meta.positions[rows]) if len(rows) else np.empty(0)
    arrays = (uniforms, meta.temperature[rows], top_k[rows], meta.top_p[rows], meta.min_p[rows])
    return _Group(rows, _rows_of(logits, rows), *(torch.from_numpy(array).to(logits.device) for array in arrays))


def _sort_descending(logits: Tensor) -> Tensor:
    """Values of each row [n, V], largest first."""
    if logits.device.type == "cpu":
        # numpy's vectorised sort of plain values: a tenth of the time of torch's, which carries indices along.
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)[:, ::-1].copy())
    return logits.sort(-1, descending=True).values
