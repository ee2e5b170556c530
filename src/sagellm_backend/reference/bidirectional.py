"""Attention of encoders: no cache, no order of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sagellm_backend.ops import ANY_KIND, register_op


@register_op("encoder_attention", kind=ANY_KIND, priority=0, source="reference")
def encoder_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """Attention of q over k and v, each `[T, H, D]`: `[T, H, D]` in the dtype of q.

    Request r owns the rows `starts[r]` to `starts[r + 1]`; each of its tokens sees all of them and no others. Scores
    are `scale * (q . k)`. Each request is a call of its own, with rows of its own in memory, so that its numbers
    depend on nobody else's.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start, end in pairwise(starts):
        query, key, value = (x[start:end].transpose(0, 1).contiguous().unsqueeze(0) for x in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
        out[start:end] = attended[0].transpose(0, 1)
    return out
