"""int8: one scale a row (output channel), symmetric (Dettmers et al., "LLM.int8()", 2022, arXiv:2208.07339)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sagellm_backend import QuantizedTensor
from sagellm_compression.quantization.base import QuantMethod, symmetric_codes


class Int8(QuantMethod):
    """Codes 1 to 255 around 128."""

    name = "int8"
    bits_per_weight: ClassVar[float] = 8.0

    def quantize_rows(self, rows: Tensor) -> QuantizedTensor:
        """See `QuantMethod.quantize_rows`."""
        codes, scales = symmetric_codes(rows, 8)
        return QuantizedTensor(codes, scales[:, None].contiguous(), None, 8, rows.shape[1])
