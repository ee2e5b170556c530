"""Decoding strategies: how a request becomes tokens, one small class each.

A strategy takes a client of the engine core and a request and yields the request's outputs. Greedy and sampling pass
the request on: their work is done inside the step, for all requests of a batch at once. Beam search and contrastive
search drive short sub-requests over the same client. `get_strategy` finds a strategy by name, `register_strategy`
adds one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_core.decoding.base import BaseDecodingStrategy, child_request
    from sagellm_core.decoding.beam_search import BeamSearchDecoding
    from sagellm_core.decoding.contrastive import ContrastiveDecoding
    from sagellm_core.decoding.registry import available_strategies, get_strategy, register_strategy
    from sagellm_core.decoding.sampling import GreedyDecoding, SamplingDecoding
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            ".base": ("BaseDecodingStrategy", "child_request"),
            ".beam_search": ("BeamSearchDecoding",),
            ".contrastive": ("ContrastiveDecoding",),
            ".registry": ("available_strategies", "get_strategy", "register_strategy"),
            ".sampling": ("GreedyDecoding", "SamplingDecoding"),
        },
    )

__all__ = [
    "BaseDecodingStrategy",
    "BeamSearchDecoding",
    "ContrastiveDecoding",
    "GreedyDecoding",
    "SamplingDecoding",
    "available_strategies",
    "child_request",
    "get_strategy",
    "register_strategy",
]
