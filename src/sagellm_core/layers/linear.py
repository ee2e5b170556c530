"""Linear layers over the backend's packed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import OpTable, PackedLinear

__all__ = ["Linear"]


class Linear:
    """`x @ weight.T + bias`, the weight packed once for the backend's kernel.

    Projections that read the same input (q, k, v; gate, up) are joined along their outputs before they come here:
    one call reads the input once.
    """

    __slots__ = ("_bias", "_linear", "_packed")

    def __init__(self, ops: OpTable, packed: PackedLinear, bias: Tensor | None = None) -> None:
        self._linear = ops.linear
        self._packed = packed
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return self._linear(x, self._packed, self._bias)
