"""Matrix products: `pack_linear`, `linear` and the experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sagellm_backend.invariance import linear_rows, row_plan
from sagellm_backend.ops import ANY_KIND, OpTable, PackedLinear, register_op
from sagellm_backend.quantized import QuantizedTensor, format_name
from sagellm_protocol import InvalidArgumentError

_SOURCE = "reference"


# Below this many summands a product of bytes is exact in float32, in any order: all sums stay below 2^24.
_EXACT_IN_FLOAT32 = 512
# Rows whose largest magnitude is smaller count as zero: their scale would not fit a float.
_SMALLEST_ROW = 1e-30


class ReferencePackedLinear(PackedLinear):
    """The weight as it is, `[N, K]`."""

    __slots__ = ("weight",)

    def __init__(self, weight: Tensor | QuantizedTensor) -> None:
        n, k = weight.shape
        if isinstance(weight, QuantizedTensor):
            parts = (weight.codes, weight.scales, weight.mins)
            nbytes = sum(part.nbytes for part in parts if part is not None)
            super().__init__(k, n, torch.uint8, nbytes, weight.format)
        else:
            super().__init__(k, n, weight.dtype, weight.nbytes, format_name(weight.dtype))
        self.weight = weight


@register_op("pack_linear", kind=ANY_KIND, priority=0, source=_SOURCE)
def pack_linear(weight: Tensor | QuantizedTensor) -> PackedLinear:
    """The weight `[N, K]` in the form that `linear` of the same table reads; the caller may drop its tensor."""
    if isinstance(weight, QuantizedTensor):
        return ReferencePackedLinear(weight)
    if weight.dim() != 2:
        raise InvalidArgumentError(f"a linear weight has two dimensions, got {tuple(weight.shape)}", field="weight")
    return ReferencePackedLinear(weight.contiguous())


@register_op("quantize_linear", kind=ANY_KIND, priority=0, source=_SOURCE)
def quantize_linear(weight: Tensor, bits: int, group_size: int) -> PackedLinear:
    """`pack_linear` of the float matrix `[N, K]` after symmetric rounding, see `QuantizedTensor.round`."""
    return pack_linear(QuantizedTensor.round(weight, bits, group_size))


@register_op("linear", kind=ANY_KIND, priority=0, source=_SOURCE)
def linear(x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
    """`x [T, K] @ weight^T + bias -> [T, N]` in the dtype of `x`.

    Where the weight is stored narrower than `x`, the product is computed in the weight's dtype: x is rounded to
    it first and the result back. A `QuantizedTensor` multiplies rows in bytes, see `quantized_linear`. The bias `[N]`
    is added last.
    """
    assert isinstance(packed, ReferencePackedLinear), packed
    weight = packed.weight
    if isinstance(weight, QuantizedTensor):
        y = quantized_linear(x.float(), weight).to(x.dtype)
    else:
        rows = x.to(weight.dtype)
        y = linear_rows(rows, weight, row_plan("linear", rows.dtype, rows.device)).to(x.dtype)
    return y if bias is None else y + bias


def unpack_rows(ids: Tensor, packed: PackedLinear) -> Tensor:
    """Rows `ids [T]` of a packed matrix, `[T, K]`; float32 where it holds whole numbers."""
    assert isinstance(packed, ReferencePackedLinear), packed
    weight = packed.weight
    if not isinstance(weight, QuantizedTensor):
        return weight[ids]
    mins = None if weight.mins is None else weight.mins[ids]
    return replace(weight, codes=weight.codes[ids], scales=weight.scales[ids], mins=mins).dequantize()


def quantized_linear(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """`x [T, K] @ weight^T -> [T, N]`, all float32, with whole numbers on both sides.

    A row of x becomes `codes * scale` with codes -127 to 127 (`quantize_rows`). The products of codes are summed
    exactly within a group of the weight, so that their order cannot matter; the groups follow one another in
    float32, each a fused multiply-add: `y += scale * sum`, and with minima `y -= min * (sum of x's codes)`. The
    row's scale comes last.
    """
    codes, row_scales = quantize_rows(x)
    exact = torch.float32 if weight.group_size <= _EXACT_IN_FLOAT32 else torch.float64
    y = x.new_zeros(x.shape[0], weight.shape[0])
    for group, first in enumerate(range(0, weight.shape[1], weight.group_size)):
        columns = slice(first, first + weight.group_size)
        part = codes[:, columns].to(exact)
        dots = part @ (weight.codes[:, columns].to(exact) - weight.offset).T
        y = _fused_multiply_add(weight.scales[:, group], dots.float(), y)
        if weight.mins is not None:
            y = _fused_multiply_add(-weight.mins[:, group], part.sum(1, keepdim=True).float(), y)
    return y * row_scales


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[T, K]` as whole numbers -127 to 127 (in float32) and a scale `[T, 1]` each: their largest magnitude / 127.

    The vector-wise scheme of LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339), rounded half to even. Rows
    with a NaN or an infinity have the scale NaN.
    """
    largest = x.abs().amax(1, keepdim=True)
    usable = (largest > _SMALLEST_ROW) & largest.isfinite()
    codes = torch.where(usable, torch.round(x * (127 / largest)), 0.0)
    scales = torch.where(usable, largest / 127, torch.where(largest.isfinite(), 0.0, float("nan")))
    return codes, scales


def _fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c, rounded to float32 once: the product of a half and a float is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


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
