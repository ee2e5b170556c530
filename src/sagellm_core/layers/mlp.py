"""Dense feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .linear import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import OpTable
    from sagellm_backend.ops import Approximation
    from sagellm_core.models.spec import Activation

__all__ = ["MLP", "gated_activation", "plain_activation"]


class MLP:
    """`down(act(up(x)))`; gated blocks compute gate and up in one projection that their activation joins."""

    __slots__ = ("_act", "_down", "_up")

    def __init__(self, up: Linear, act: Callable[[Tensor], Tensor], down: Linear) -> None:
        self._up = up
        self._act = act
        self._down = down

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self._down(self._act(self._up(x)))


def gated_activation(ops: OpTable, activation: Activation) -> Callable[[Tensor], Tensor]:
    """[T, 2F] (gate first) -> [T, F]."""
    if activation == "silu":
        return ops.silu_and_mul
    gelu_and_mul, approximate = ops.gelu_and_mul, _approximate(activation)
    return lambda x: gelu_and_mul(x, approximate)


def plain_activation(ops: OpTable, activation: Activation) -> Callable[[Tensor], Tensor]:
    """[T, F] -> [T, F]; GELU in one of its two forms (no supported family has an ungated SiLU)."""
    gelu, approximate = ops.gelu, _approximate(activation)
    return lambda x: gelu(x, approximate)


def _approximate(activation: Activation) -> Approximation:
    assert activation != "silu"
    return "tanh" if activation == "gelu_tanh" else "none"
