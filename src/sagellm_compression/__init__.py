"""Smaller weights, smaller caches, fewer steps.

So far: `fusion`, exact rewrites of weights held in memory. No quantisation, sparsity or speculative decoding is
offered yet; models run in the dtype of their checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_compression.fusion import fold_norm_offset, fuse_rows, ungroup_heads
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            ".fusion": ("fold_norm_offset", "fuse_rows", "ungroup_heads"),
        },
    )

__all__ = ["fold_norm_offset", "fuse_rows", "ungroup_heads"]
