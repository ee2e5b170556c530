"""Self-attention of encoders: every token of a text sees all of it, and nothing is kept for later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .linear import Linear
from .rotary import RotaryEmbedding

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import OpTable

__all__ = ["EncoderAttention"]


class EncoderAttention:
    """Project to queries, keys and values, place them where positions are rotary, attend, project back."""

    __slots__ = ("_attend", "_head_dim", "_o", "_qkv", "_rotary", "_scale")

    def __init__(self, ops: OpTable, head_dim: int, *, qkv: Linear, o: Linear, rotary: RotaryEmbedding | None) -> None:
        self._attend = ops.encoder_attention
        self._qkv = qkv
        self._o = o
        self._rotary = rotary
        self._head_dim = head_dim
        self._scale = head_dim**-0.5

    def __call__(self, x: Tensor, positions: Tensor, starts: Sequence[int]) -> Tensor:
        """x [T, H], positions [T], text r in the rows starts[r] to starts[r + 1] -> [T, H]."""
        q, k, v = (part.view(len(x), -1, self._head_dim) for part in self._qkv(x).chunk(3, dim=-1))
        if self._rotary is not None:
            q, k = self._rotary(q, k, positions)
        return self._o(self._attend(q, k, v, starts, self._scale).view(len(x), -1))
