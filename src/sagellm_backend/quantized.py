"""`QuantizedTensor`: a matrix in whole numbers, as quantizers and file formats hand it to `pack_linear`.

Every format that the CPU kernels multiply without dequantizing is an instance of this one description: int8 a channel,
int4 in groups, and the blocks of GGUF (Q8_0, Q4_0: symmetric groups of 32; Q4_K, Q5_K: groups of 32 with a minimum;
Q6_K: symmetric groups of 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sagellm_protocol import InvalidArgumentError

BITS = (4, 5, 6, 8)
_FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def format_name(dtype: torch.dtype, bits: int = 0, group_size: int = 0, *, minima: bool = False) -> str:
    """How a weight is stored: "bf16", or "int8", "int4/g32", "int4/g32+min" (group size 0: one scale a row)."""
    if not bits:
        return _FLOATS.get(dtype, str(dtype).removeprefix("torch."))
    return f"int{bits}" + (f"/g{group_size}" if group_size else "") + ("+min" if minima else "")


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix [N, K] with one scale (and perhaps one minimum) a row and group of `group_size` neighbours along K.

    Entry (n, k) of group g = k // group_size stands for `scales[n, g] * (codes[n, k] - offset) - mins[n, g]`, where
    the offset is 2^(bits - 1) without minima and 0 with them. Symmetric quantizers don't use code 0.

    `codes` is [N, K] uint8 below 2^bits, `scales` [N, G] float16, `mins` [N, G] float16 or None, G = ceil(K /
    group_size). `group_size` K means one scale a row.
    """

    codes: Tensor
    scales: Tensor
    mins: Tensor | None
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.codes.dtype is not torch.uint8 or self.codes.dim() != 2:
            raise InvalidArgumentError(f"codes must be a uint8 matrix of {BITS} bits, got {self.bits}", field="bits")
        wanted = (self.shape[0], -(-self.shape[1] // self.group_size))
        for name, tensor in (("scales", self.scales), ("mins", self.mins)):
            if tensor is not None and (tuple(tensor.shape) != wanted or tensor.dtype is not torch.float16):
                raise InvalidArgumentError(
                    f"{name} must be float16 of shape {list(wanted)}, got {tensor.dtype} {list(tensor.shape)}",
                    field=name,
                )

    @classmethod
    def round(cls, weight: Tensor, bits: int, group_size: int) -> QuantizedTensor:
        """Symmetric rounding of a float matrix [N, K].

        The scale of a group is its largest magnitude / (2^(bits - 1) - 1), rounded to float16 before it divides, so
        that what is stored is what was divided by; codes are round(weight / scale) + offset, ties to even.
        """
        n, k = weight.shape
        largest = (1 << (bits - 1)) - 1
        groups = torch.nn.functional.pad(weight.float(), (0, -k % group_size)).view(n, -1, group_size)
        scales = (groups.abs().amax(-1) / largest).half()
        divisors = scales.float().unsqueeze(-1)
        whole = torch.where(divisors > 0, groups / divisors, 0.0).round_().clamp_(-largest, largest)
        codes = (whole + (largest + 1)).to(torch.uint8).flatten(1)[:, :k]
        return cls(codes, scales, None, bits, group_size)

    @property
    def format(self) -> str:
        """Its name for people."""
        groups = self.scales.shape[1]
        return format_name(torch.uint8, self.bits, 0 if groups == 1 else self.group_size, minima=self.mins is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def offset(self) -> int:
        """What is taken off a code before it is scaled."""
        return 0 if self.mins is not None else 1 << (self.bits - 1)

    def dequantize(self) -> Tensor:
        """The matrix in float32 [N, K]."""
        columns = torch.arange(self.shape[1], device=self.codes.device) // self.group_size
        values = (self.codes.float() - self.offset) * self.scales.float()[:, columns]
        return values if self.mins is None else values - self.mins.float()[:, columns]

    def map_rows(self, convert: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """The same matrix with its rows in the order that `convert` gives to the rows of any tensor."""
        mins = None if self.mins is None else convert(self.mins)
        return replace(self, codes=convert(self.codes), scales=convert(self.scales), mins=mins)

    def widened(self, bits: int, group_size: int, *, minima: bool) -> QuantizedTensor:
        """The same values in a format that can hold them: as many or more bits, groups that divide its own, minima."""
        repeats = self.group_size // group_size if group_size < self.group_size else 1
        groups = -(-self.shape[1] // group_size)
        scales = self.scales.repeat_interleave(repeats, 1)[:, :groups]
        if minima:
            mins = self.offset * self.scales if self.mins is None else self.mins
            return QuantizedTensor(self.codes, scales, mins.repeat_interleave(repeats, 1)[:, :groups], bits, group_size)
        shift = (1 << (bits - 1)) - self.offset
        return QuantizedTensor(self.codes + shift, scales, None, bits, group_size)


def join_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The rows of several matrices of one width K in one: in their own format if it is the same, else in the narrowest
    that holds all of them, without a change of any value (GGUF files mix formats within a layer)."""
    first = parts[0]
    if any((p.bits, p.group_size, p.mins is None) != (first.bits, first.group_size, first.mins is None) for p in parts):
        bits = max(part.bits for part in parts)
        group_size = math.gcd(*(part.group_size for part in parts))
        if bits == 5 and group_size % 32:
            bits = 6  # the kernels read five bits in groups of 32 only
        minima = any(part.mins is not None for part in parts)
        parts = [part.widened(bits, group_size, minima=minima) for part in parts]
        first = parts[0]
    mins = None if first.mins is None else torch.cat([part.mins for part in parts if part.mins is not None])
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return QuantizedTensor(codes, scales, mins, first.bits, first.group_size)
