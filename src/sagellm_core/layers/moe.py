"""Mixture of experts: a router picks experts a token, the backend runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .linear import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import OpTable, PackedLinear
    from sagellm_core.models.spec import MoESpec

__all__ = ["MoE"]


class MoE:
    """Router, top-k and the weighted sum of the chosen experts' outputs."""

    __slots__ = ("_down", "_experts", "_gate_up", "_norm_topk_prob", "_router", "_top_k")

    def __init__(
        self,
        ops: OpTable,
        spec: MoESpec,
        router: Linear,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
    ) -> None:
        self._experts = ops.moe_experts
        self._router = router
        self._gate_up = list(gate_up)
        self._down = list(down)
        self._top_k = spec.top_k
        self._norm_topk_prob = spec.norm_topk_prob

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        probabilities = torch.softmax(self._router(x), dim=-1, dtype=torch.float32)
        weights, experts = torch.topk(probabilities, self._top_k, dim=-1)
        if self._norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self._experts(x, experts, weights.to(x.dtype), self._gate_up, self._down, "silu")
