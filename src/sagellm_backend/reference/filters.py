"""Which tokens may be drawn: top-k, then top-p, then min-p, over tokens in order of falling probability.

In that order every filter keeps a prefix, so a filter is a count and all three together are the smallest count.
Semantics are those of transformers' warpers (and of vLLM where the two agree): each filter sees the distribution that
the one before left, renormalised, and the most probable token always stays.
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_kept(
    weights: Tensor, cumulative: Tensor, after_top_k: Tensor, total: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """How many tokens of each row stay: [R] int64, at least 1.

    Args:
        weights: [R, K] softmax weights in falling order, scaled so that the first is 1.
        cumulative: [R, K] float64, their running sums.
        after_top_k: [R] int64, tokens that top-k leaves; ties at the k-th value count in, as in both libraries.
        total: [R] float64, weight of all tokens that top-k leaves.
        top_p: [R] float64; a token stays while those before it sum to less than top_p (Holtzman et al.,
            arXiv:1904.09751).
        min_p: [R] float64; a token stays if its probability is at least min_p times the largest (Nguyen et al.,
            arXiv:2407.01082).
    """
    nucleus = nucleus_size(cumulative, total, top_p)
    likely = torch.searchsorted(-weights, -min_p[:, None].to(weights.dtype), right=True)[:, 0]
    return torch.minimum(torch.minimum(nucleus, likely), after_top_k).clamp_(min=1)


def nucleus_size(cumulative: Tensor, total: Tensor, top_p: Tensor) -> Tensor:
    """How many tokens the nucleus has: [R] int64, one more than the row's length where the row doesn't hold it all."""
    size = torch.searchsorted(cumulative, (top_p * total)[:, None])[:, 0] + 1
    return torch.where(top_p < 1.0, size, cumulative.shape[-1])
