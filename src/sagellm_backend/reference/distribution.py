"""A row of logits as a distribution: softmax weights, inverse CDF, the most probable tokens.

Nothing here mixes rows, and no sum depends on how many rows there are: weights are summed in fixed blocks of the row,
the blocks in order. So a row gives the same bits alone and in any batch (tested over batch sizes and thread counts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SUM_BLOCK = 1024  # weights summed in float32 at once; longer sums are float64
_MAX_BLOCK = 64  # top-k looks only into the blocks with the largest maxima


@dataclass(frozen=True, slots=True)
class SoftmaxWeights:
    """exp((logit - peak) / temperature): numerators of a softmax, in blocks of the vocabulary; R rows."""

    peak: Tensor  # [R] float32, the largest logit
    blocks: Tensor  # [R, num_blocks, block] float32, 0 beyond the vocabulary
    block_sums: Tensor  # [R, num_blocks] float64

    @property
    def total(self) -> Tensor:
        """Sum of a row's weights: [R] float64."""
        return self.block_sums.cumsum(-1)[:, -1]

    @property
    def log_normalizer(self) -> Tensor:
        """log(sum(exp(logits))) for weights of temperature 1: [R] float64."""
        return self.peak.double() + self.total.log()

    def invert(self, uniforms: Tensor) -> Tensor:
        """The token whose interval of the CDF, in order of token ids, holds the uniform: [R] float64 -> [R] int64.

        A token of weight 0 is never chosen.
        """
        cumulative = self.block_sums.cumsum(-1)
        target = uniforms[:, None] * cumulative[:, -1:]
        block = _first_above(cumulative, target)
        before = torch.nn.functional.pad(cumulative, (1, 0)).gather(1, block)
        share = (target - before) / self.block_sums.gather(1, block)
        rows = torch.arange(len(block), device=block.device)
        inside = self.blocks[rows, block[:, 0]].double().cumsum(-1)
        offset = _first_above(inside, share * inside[:, -1:])
        return (block * self.blocks.shape[-1] + offset)[:, 0]


def softmax_weights(logits: Tensor, temperature: Tensor | None = None, min_p: Tensor | None = None) -> SoftmaxWeights:
    """Weights of `logits` [R, V] float32; `temperature` [R] float32; weights below `min_p` [R] x the largest are 0."""
    num_rows, vocab_size = logits.shape
    peak = logits.amax(-1).clamp_(min=torch.finfo(torch.float32).min)  # a row of -inf must not become NaN
    num_blocks = -(-vocab_size // _SUM_BLOCK)
    weights = logits.new_empty((num_rows, num_blocks * _SUM_BLOCK))
    torch.sub(logits, peak[:, None], out=weights[:, :vocab_size])
    weights[:, vocab_size:] = -torch.inf
    if temperature is not None:
        weights.div_(temperature[:, None])
    weights.exp_()
    if min_p is not None:
        weights.masked_fill_(weights < min_p[:, None], 0.0)
    blocks = weights.view(num_rows, num_blocks, _SUM_BLOCK)
    return SoftmaxWeights(peak, blocks, blocks.sum(-1).double())


def invert_sorted(cumulative: Tensor, num_kept: Tensor, uniforms: Tensor) -> Tensor:
    """Index of the token that the uniform falls on among the first `num_kept` of a row.

    `cumulative` [R, K] float64 sums of weights, `num_kept` [R] int64 >= 1, `uniforms` [R] float64 -> [R] int64.
    """
    kept = cumulative.gather(1, num_kept[:, None] - 1)
    index = torch.searchsorted(cumulative, uniforms[:, None] * kept, right=True)
    # Rounding may put the target on the very end, behind which only tokens of weight 0 come.
    return torch.minimum(index, torch.searchsorted(cumulative, kept))[:, 0].minimum(num_kept - 1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """First index whose cumulative sum exceeds the target, at most the last index with a weight: [R, 1]."""
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last).clamp_(max=cumulative.shape[1] - 1)


def argmax_rows(logits: Tensor) -> Tensor:
    """Most probable token of each row [R, V] -> [R] int64; the lowest id among equals."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))  # ten times as fast as torch's on a CPU
    peak, ids = logits.max(-1)
    ids_of_peak = torch.where(logits == peak[:, None], torch.arange(logits.shape[-1], device=logits.device), 2**62)
    return torch.where(peak.isnan(), ids, ids_of_peak.amin(-1))


def top_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest logits of each row in order (value descending, id ascending): values and ids, [R, k] each.

    Where values tie at the end, which of them are among the k is unspecified: a caller that needs to know asks for one
    more and looks (`ties_at`).
    """
    num_blocks = logits.shape[-1] // _MAX_BLOCK
    if num_blocks < 4 * k:
        values, ids = logits.topk(k, -1)
    else:
        values, ids = _top_by_blocks(logits, k, num_blocks)
    ids, order = ids.sort(-1)
    values, order = torch.sort(values.gather(-1, order), dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def ties_at(values: Tensor, count: Tensor) -> Tensor:
    """Whether the last of the first `count` [R] of sorted `values` [R, K] equals the next one: [R] bool.

    Tokens without probability (-inf) don't count as tied.
    """
    last = values.gather(1, (count - 1)[:, None])
    following = values.gather(1, count.clamp(max=values.shape[1] - 1)[:, None])
    return ((last == following) & (last > -torch.inf) & (count[:, None] < values.shape[1]))[:, 0]


def _top_by_blocks(logits: Tensor, k: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Top-k of a long row: at most k blocks can hold the k largest, and those have the largest maxima."""
    body = logits[:, : num_blocks * _MAX_BLOCK].view(-1, num_blocks, _MAX_BLOCK)
    blocks = body.amax(-1).topk(k, -1, sorted=False).indices  # [R, k]
    picked = body.gather(1, blocks[..., None].expand(-1, -1, _MAX_BLOCK)).flatten(1)
    offsets = torch.arange(_MAX_BLOCK, device=logits.device)
    picked_ids = (blocks[..., None] * _MAX_BLOCK + offsets).flatten(1)
    tail_ids = torch.arange(num_blocks * _MAX_BLOCK, logits.shape[-1], device=logits.device).expand(len(logits), -1)
    candidates = torch.cat([picked, logits[:, num_blocks * _MAX_BLOCK :]], dim=-1)
    values, index = candidates.topk(k, -1, sorted=False)
    return values, torch.cat([picked_ids, tail_ids], dim=-1).gather(1, index)
