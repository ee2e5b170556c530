"""RMS and layer norms, alone or joined with the addition to the residual stream before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import OpTable

__all__ = ["LayerNorm", "NoNorm", "Norm", "RMSNorm"]


class Norm(Protocol):
    """A norm of the last dimension."""

    def __call__(self, x: Tensor) -> Tensor:
        """The normalised x."""

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""


class RMSNorm:
    """`x / sqrt(mean(x^2) + eps) * weight`."""

    __slots__ = ("_add_rms_norm", "_eps", "_rms_norm", "_weight")

    def __init__(self, ops: OpTable, weight: Tensor, eps: float) -> None:
        self._rms_norm = ops.rms_norm
        self._add_rms_norm = ops.add_rms_norm
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], D the width of the weight."""
        return self._rms_norm(x, self._weight, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual) in one pass."""
        return self._add_rms_norm(x, residual, self._weight, self._eps)


class LayerNorm:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`."""

    __slots__ = ("_bias", "_eps", "_layer_norm", "_weight")

    def __init__(self, ops: OpTable, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self._layer_norm = ops.layer_norm
        self._weight = weight
        self._bias = bias
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self._layer_norm(x, self._weight, self._bias, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        residual = residual + x
        return self(residual), residual


class NoNorm:
    """The place of a norm in models that have none there; it only adds to the residual stream."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(x + residual, x + residual), one tensor twice: neither may be written to."""
        residual = residual + x
        return residual, residual
