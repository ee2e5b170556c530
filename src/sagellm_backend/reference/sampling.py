"""Choosing tokens from logits, in plain torch: the op `sample_tokens`.

Rows are served in up to four groups, by what they cost: greedy rows by an argmax; rows without top-k and top-p by the
CDF in order of token ids, unsorted; rows with a small top-k or a narrow nucleus by their most probable tokens; what
is left (wide nucleus, large top-k, ties at the cut) by sorting the row. A row's group depends on its own parameters and
logits alone, hence so does its token, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sagellm_backend.ops import ANY_KIND, register_op
from sagellm_backend.reference.distribution import (
    argmax_rows,
    invert_sorted,
    softmax_weights,
    ties_at,
    top_candidates,
)
from sagellm_backend.reference.filters import nucleus_size, num_kept

_LARGEST_TOP_K = 1024  # above, sorting the row is as fast
_NUCLEUS_CANDIDATES = 128  # holds the nucleus of nearly all rows of a trained model


@register_op("sample_tokens", kind=ANY_KIND, priority=0, source="reference")
def sample_tokens(logits: Tensor, wanted: Tensor) -> Tensor:
    """One token for each row of `logits` [R, V] float32: [R] int64 on the same device.

    `wanted` [R, 5] float64, on the host, says how: temperature (0 = take the most probable token, the lowest id among
    equals; the rest means nothing then), top_k (0 = off), top_p (1 = off), min_p (0 = off) and a uniform number in
    (0, 1), which inverts the CDF of the filtered distribution. With top-k or top-p the CDF runs in order of falling
    logits, equals by rising id, else in order of token ids.

    Implementations agree on all but draws within a rounding error of the border between two tokens, and each of them
    gives a row the same token in any company. A row of NaN or of -inf alone gets some token and harms no other.
    """
    columns = wanted.numpy().T
    top_k = np.where(columns[1] < logits.shape[-1], columns[1], 0.0)
    cut = (top_k > 0) | (columns[2] < 1.0)
    large = top_k > _LARGEST_TOP_K
    drawn = columns[0] > 0
    if not drawn.any():
        return argmax_rows(logits)
    token_ids = np.empty(len(logits), dtype=np.int64)
    greedy = np.flatnonzero(~drawn)
    if len(greedy):
        token_ids[greedy] = argmax_rows(_rows_of(logits, greedy)).cpu().numpy()
    _draw_unsorted(_group(logits, columns, top_k, drawn & ~cut), token_ids)
    rest = _draw_from_candidates(_group(logits, columns, top_k, drawn & cut & ~large), token_ids)
    _draw_sorted(rest, token_ids)
    _draw_sorted(_group(logits, columns, top_k, drawn & large), token_ids)
    return torch.from_numpy(token_ids).to(logits.device)


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are drawn in the same way; n rows, tensors on the logits' device."""

    rows: NDArray[np.int64]  # [n] their places in the batch
    logits: Tensor  # [n, V]
    temperature: Tensor  # [n] float32
    top_k: Tensor  # [n] int64; 0 = off
    top_p: Tensor  # [n] float64
    min_p: Tensor  # [n] float64
    uniforms: Tensor  # [n] float64

    def select(self, keep: Tensor) -> _Group:
        """The rows where `keep` [n] bool is set."""
        if bool(keep.all()):
            return self
        return _Group(
            self.rows[keep.cpu().numpy()],
            self.logits[keep],
            self.temperature[keep],
            self.top_k[keep],
            self.top_p[keep],
            self.min_p[keep],
            self.uniforms[keep],
        )


def _draw_unsorted(group: _Group, token_ids: NDArray[np.int64]) -> None:
    """Temperature and min-p alone: no order is needed."""
    if not len(group.rows):
        return
    min_p = group.min_p if bool(group.min_p.any()) else None
    weights = softmax_weights(group.logits, group.temperature, min_p)
    # The clamp is for rows of NaN alone.
    token_ids[group.rows] = weights.invert(group.uniforms).clamp_(max=group.logits.shape[-1] - 1).cpu().numpy()


def _draw_from_candidates(group: _Group, token_ids: NDArray[np.int64]) -> _Group:
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


def _draw_sorted(group: _Group, token_ids: NDArray[np.int64]) -> None:
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


def _rows_of(logits: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """`logits` at `rows` (rising): itself if those are all, else a copy."""
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, torch.from_numpy(rows).to(logits.device))


def _group(
    logits: Tensor, columns: NDArray[np.float64], top_k: NDArray[np.float64], chosen: NDArray[np.bool_]
) -> _Group:
    rows = np.flatnonzero(chosen)
    temperature, _, top_p, min_p, uniforms = np.ascontiguousarray(columns[:, rows])
    arrays = (temperature.astype(np.float32), top_k[rows].astype(np.int64), top_p, min_p, uniforms)
    return _Group(rows, _rows_of(logits, rows), *(torch.from_numpy(array).to(logits.device) for array in arrays))


def _sort_descending(logits: Tensor) -> Tensor:
    """Values of each row [n, V], largest first."""
    if logits.device.type == "cpu":
        # numpy's vectorised sort of plain values: a tenth of the time of torch's, which carries indices along.
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)[:, ::-1].copy())
    return logits.sort(-1, descending=True).values
