"""int4: one scale a group of neighbours in a row, symmetric, or with the group's minimum."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sagellm_backend import QuantizedTensor
from sagellm_compression.quantization.base import QuantMethod, SymmetricRounding


class Int4(SymmetricRounding):
    """Groups of 32, codes 1 to 15 around 8: 4.5 bits a weight."""

    name = "int4"
    bits = 4
    group_size: ClassVar[int | None] = 32
    bits_per_weight: ClassVar[float] = 4.5


class Int4Group64(Int4):
    """Groups of 64: 4.25 bits a weight."""

    name = "int4-g64"
    group_size: ClassVar[int | None] = 64
    bits_per_weight: ClassVar[float] = 4.25


class Int4Group128(Int4):
    """Groups of 128: 4.125 bits a weight."""

    name = "int4-g128"
    group_size: ClassVar[int | None] = 128
    bits_per_weight: ClassVar[float] = 4.125


class Int4Asymmetric(QuantMethod):
    """Groups of 32 between their smallest and their largest weight: 5 bits a weight, and less error."""

    name = "int4-asym"
    bits_per_weight: ClassVar[float] = 5.0
    group_size: ClassVar[int] = 32

    def quantize_rows(self, rows: Tensor) -> QuantizedTensor:
        """See `QuantMethod.quantize_rows`: weight = scale * code - min."""
        num_rows, num_columns = rows.shape
        padded = torch.nn.functional.pad(rows.float(), (0, -num_columns % self.group_size))
        groups = padded.view(num_rows, -1, self.group_size)
        # Zero stays within reach, so that padding and pruned weights are exact enough.
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        mins, scales = (-low).half(), ((high - low) / 15).half()
        divisors = scales.float().unsqueeze(-1)
        shifted = groups + mins.float().unsqueeze(-1)
        codes = torch.where(divisors > 0, shifted / divisors, 0.0).round_().clamp_(0, 15).to(torch.uint8)
        return QuantizedTensor(codes.flatten(1)[:, :num_columns], scales, mins, 4, self.group_size)
