"""int8: one scale a row (output channel), symmetric (Dettmers et al., "LLM.int8()", 2022, arXiv:2208.07339)."""

from __future__ import annotations

from typing import ClassVar

from sagellm_compression.quantization.base import SymmetricRounding


class Int8(SymmetricRounding):
    """Codes 1 to 255 around 128."""

    name = "int8"
    bits = 8
    group_size = None
    bits_per_weight: ClassVar[float] = 8.0
