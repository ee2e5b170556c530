"""Matrix products: `pack_linear`, `linear` and the experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sagellm_backend.invariance import linear_rows, row_plan
from sagellm_backend.ops import ANY_KIND, OpTable, PackedLinear, register_op
from sagellm_protocol import InvalidArgumentError

_SOURCE = "reference"


class ReferencePackedLinear(PackedLinear):
    """The weight as it is, `[N, K]`."""

    __slots__ = ("weight",)

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], weight.dtype, weight.nbytes)
        self.weight = weight


@register_op("pack_linear", kind=ANY_KIND, priority=0, source=_SOURCE)
def pack_linear(weight: Tensor) -> PackedLinear:
    """The weight `[N, K]` in the form that `linear` of the same table reads; the caller may drop its tensor."""
    if weight.dim() != 2:
        raise InvalidArgumentError(f"a linear weight has two dimensions, got {tuple(weight.shape)}", field="weight")
    return ReferencePackedLinear(weight.contiguous())


@register_op("linear", kind=ANY_KIND, priority=0, source=_SOURCE)
def linear(x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
    """`x [T, K] @ weight^T + bias -> [T, N]` in the dtype of `x`.

    Where the weight is stored narrower than `x`, the product is computed in the weight's dtype: x is rounded to
    it first and the result back. The bias `[N]` is added last.
    """
    assert isinstance(packed, ReferencePackedLinear), packed
    weight = packed.weight
    rows = x.to(weight.dtype)
    y = linear_rows(rows, weight, row_plan("linear", rows.dtype, rows.device)).to(x.dtype)
    return y if bias is None else y + bias


@register_op("moe_experts", kind=ANY_KIND, priority=0, source=_SOURCE, composite=True)
def moe_experts(
    ops: OpTable,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    act: str = "silu",
) -> Tensor:
    """The weighted sum of each token's experts.

    x `[T, K]`, topk_ids `[T, k]` int64 and topk_weights `[T, k]`; expert e computes
    `down[e](act(gate) * up)` with `gate_up[e]` holding gate over up. A token's experts are summed in the order
    of their numbers. `act` is silu, gelu or gelu_tanh. Returns `[T, K]`.
    """
    out = torch.zeros_like(x)
    for expert in torch.unique(topk_ids).tolist():
        tokens, places = torch.nonzero(topk_ids == expert, as_tuple=True)
        hidden = ops.linear(x[tokens], gate_up[expert])
        hidden = _activate(ops, hidden, act)
        out[tokens] += ops.linear(hidden, down[expert]) * topk_weights[tokens, places, None].to(x.dtype)
    return out


def _activate(ops: OpTable, x: Tensor, act: str) -> Tensor:
    if act == "silu":
        return ops.silu_and_mul(x)
    if act == "gelu":
        return ops.gelu_and_mul(x, "none")
    if act == "gelu_tanh":
        return ops.gelu_and_mul(x, "tanh")
    raise InvalidArgumentError(f"experts have no activation {act!r}: use silu, gelu or gelu_tanh", field="act")
