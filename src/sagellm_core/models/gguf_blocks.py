"""Quantized blocks of GGUF files as `QuantizedTensor`, code by code: nothing is dequantized and nothing is rounded but
the products of the two scales that K-quants keep (to float16).

Layouts are those of ggml (ggml-common.h and the reference routines of the package `gguf`): little-endian, blocks along
the rows, "d" and "m" float16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sagellm_backend import QuantizedTensor

__all__ = ["BLOCK_TYPES", "read_blocks"]

_Reader = Callable[[Tensor], tuple[Tensor, Tensor, "Tensor | None", int, int]]


def read_blocks(type_name: str, raw: Tensor, shape: tuple[int, int]) -> QuantizedTensor:
    """The matrix [N, K] whose bytes are `raw` (uint8); `type_name` is one of `BLOCK_TYPES`."""
    num_rows, num_columns = shape
    reader, block_bytes = BLOCK_TYPES[type_name]
    codes, scales, mins, bits, group_size = reader(raw.view(-1, block_bytes))
    return QuantizedTensor(
        codes.reshape(num_rows, num_columns),
        scales.reshape(num_rows, -1),
        None if mins is None else mins.reshape(num_rows, -1),
        bits,
        group_size,
    )


def _halves(blocks: Tensor, first: int, last: int) -> Tensor:
    """float16 numbers in the bytes [first, last) of each block."""
    return blocks[:, first:last].contiguous().view(torch.float16)


def _nibbles(packed: Tensor) -> Tensor:
    """[.., S] bytes -> [.., 2 S]: all low halves, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """d, 32 signed bytes."""
    return blocks[:, 2:] ^ 0x80, _halves(blocks, 0, 2), None, 8, 32  # two's complement + 128


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """d, 16 bytes with two codes around 8."""
    return _nibbles(blocks[:, 2:]), _halves(blocks, 0, 2), None, 4, 32


def _q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """d, m, 16 bytes: d * code + m."""
    return _nibbles(blocks[:, 4:]), _halves(blocks, 0, 2), -_halves(blocks, 2, 4), 4, 32


def _fifth_bits(packed: Tensor) -> Tensor:
    """[B, 4] bytes -> [B, 32]: bit i of the little-endian word, times 16."""
    return ((packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1) << 4


def _q5_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """d, fifth bits, 16 bytes: codes around 16."""
    return _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]), _halves(blocks, 0, 2), None, 5, 32


def _q5_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """d, m, fifth bits, 16 bytes."""
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes, _halves(blocks, 0, 2), -_halves(blocks, 2, 4), 5, 32


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima [B, 8] of Q4_K and Q5_K: d, dmin, then 6 + 6 bits a group of 32 in 12 bytes."""
    packed = blocks[:, 4:16]
    first, second, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 6) << 4)], dim=-1)
    mins = torch.cat([second & 63, (rest >> 4) | ((second >> 6) << 4)], dim=-1)
    d, dmin = _halves(blocks, 0, 2).float(), _halves(blocks, 2, 4).float()
    return (d * scales).half(), (dmin * mins).half()


def _q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """256 codes: four runs of 32 bytes, each the low halves of one group and the high halves of the next."""
    scales, mins = _k_scales(blocks)
    return _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).flatten(1), scales, mins, 4, 32


def _q5_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """As Q4_K, with bit g of 32 bytes as the fifth bit of group g."""
    scales, mins = _k_scales(blocks)
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    groups = torch.arange(8, dtype=torch.uint8).view(8, 1)
    high = ((blocks[:, 16:48].unsqueeze(1) >> groups) & 1) << 4
    return (low | high).flatten(1), scales, mins, 5, 32


def _q6_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """256 codes around 32 in two halves: 64 bytes of low nibbles, 32 bytes of high pairs; 16 signed scales, d."""
    low = blocks[:, :128].reshape(-1, 2, 2, 32)  # [B, half, run, 32]
    low = torch.cat([low & 15, low >> 4], dim=2)  # runs 0, 1 in the low nibbles, 2, 3 in the high ones
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _halves(blocks, 208, 210).float()
    return (low | high).flatten(1), scales.half(), None, 6, 16


BLOCK_TYPES: dict[str, tuple[_Reader, int]] = {
    "Q8_0": (_q8_0, 34),
    "Q4_0": (_q4_0, 18),
    "Q4_1": (_q4_1, 20),
    "Q5_0": (_q5_0, 22),
    "Q5_1": (_q5_1, 24),
    "Q4_K": (_q4_k, 144),
    "Q5_K": (_q5_k, 176),
    "Q6_K": (_q6_k, 210),
}
"""ggml's name of a block type -> (reader, bytes of a block)."""
