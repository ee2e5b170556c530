"""Smaller weights, smaller caches, fewer steps.

`quantization` turns weights into whole numbers of 8 or 4 bits; `fusion` holds exact rewrites of weights in memory. No
sparsity or speculative decoding is offered yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_compression.fusion import fold_norm_offset, fuse_rows, ungroup_heads
    from sagellm_compression.quantization import METHODS, get_quant_method
    from sagellm_compression.quantization.base import QuantMethod
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            ".fusion": ("fold_norm_offset", "fuse_rows", "ungroup_heads"),
            ".quantization": ("METHODS", "get_quant_method"),
            ".quantization.base": ("QuantMethod",),
        },
    )

__all__ = ["METHODS", "QuantMethod", "fold_norm_offset", "fuse_rows", "get_quant_method", "ungroup_heads"]
