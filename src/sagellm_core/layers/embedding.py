"""Token (and learned position) embeddings at the bottom, the vocabulary projection on top."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .linear import Linear

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sagellm_backend import OpTable, PackedLinear

__all__ = ["Embedding", "LMHead"]


class Embedding:
    """Rows of the embedding table, scaled, plus rows of the position table where the model learned one.

    The table is a tensor [V, H] or the packed LM head of a model that uses one matrix for both.
    """

    __slots__ = ("_dtype", "_embedding", "_positions", "_scale", "_table")

    def __init__(
        self, ops: OpTable, table: Tensor | PackedLinear, positions: Tensor | None, scale: float, dtype: torch.dtype
    ) -> None:
        self._table = table
        self._embedding = ops.embedding
        self._positions = positions
        self._scale = scale
        self._dtype = dtype

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids [T], positions [T] -> [T, H] in the compute dtype, a tensor of its own."""
        x = self._embedding(input_ids, self._table, self._dtype)
        if self._scale != 1.0:
            x = x * self._scale
        if self._positions is not None:
            x = x + self._embedding(positions, self._positions, self._dtype)
        return x


class LMHead:
    """Hidden states -> logits in float32, scaled and softly capped."""

    __slots__ = ("_cap", "_linear", "_scale", "_soft_cap")

    def __init__(self, ops: OpTable, linear: Linear, scale: float, soft_cap: float) -> None:
        self._cap = ops.soft_cap
        self._linear = linear
        self._scale = scale
        self._soft_cap = soft_cap

    def __call__(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, vocab] float32."""
        logits = self._linear(hidden).float()
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._soft_cap:
            logits = self._cap(logits, self._soft_cap)
        return logits
