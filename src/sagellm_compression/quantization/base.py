"""`QuantMethod`, what all quantizers of weights are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sagellm_backend import QuantizedTensor

# Rows quantized at a time: their float32 copies stay small beside the weight.
_ROWS = 2048


class QuantMethod(ABC):
    """Turns a matrix into whole numbers, row by row: the same rows give the same codes in any company."""

    name: ClassVar[str]
    bits_per_weight: ClassVar[float]
    """Memory of a weight, scales included."""

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """A matrix [N, K] of any float dtype."""
        parts = [self.quantize_rows(rows.float()) for rows in torch.split(weight, _ROWS)]
        mins = None if parts[0].mins is None else torch.cat([part.mins for part in parts if part.mins is not None])
        return QuantizedTensor(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            mins,
            parts[0].bits,
            parts[0].group_size,
        )

    @abstractmethod
    def quantize_rows(self, rows: Tensor) -> QuantizedTensor:
        """Some rows [R, K] in float32."""


def symmetric_codes(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric rounding: groups [..., S] float32 -> (codes [..., S] uint8, scales [...] float16).

    The scale is absmax / (2^(bits - 1) - 1), rounded to float16 before it divides, so that what is stored is what was
    divided by; codes are round(weight / scale) + 2^(bits - 1), nearest even, code 0 unused.
    """
    largest = (1 << (bits - 1)) - 1
    scales = (groups.abs().amax(-1) / largest).half()
    divisors = scales.float().unsqueeze(-1)
    whole = torch.where(divisors > 0, groups / divisors, 0.0).round_().clamp_(-largest, largest)
    return (whole + (largest + 1)).to(torch.uint8), scales


def in_groups(rows: Tensor, size: int) -> Tensor:
    """[R, K] -> [R, ceil(K / size), size], zeros behind the end."""
    missing = -rows.shape[1] % size
    padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return padded.view(rows.shape[0], -1, size)
