"""Norms, activations, rotary positions and embeddings: ops that treat each row by itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sagellm_backend.ops import ANY_KIND, Approximation, PackedLinear, register_op
from sagellm_backend.reference.matmul import unpack_rows

_SOURCE = "reference"


@register_op("embedding", kind=ANY_KIND, priority=0, source=_SOURCE)
def embedding(ids: Tensor, table: Tensor | PackedLinear, dtype: torch.dtype) -> Tensor:
    """Rows `ids [T]` of `table [V, H]`, as `dtype`; the table may be a packed matrix (tied embeddings)."""
    if isinstance(table, PackedLinear):
        return unpack_rows(ids, table).to(dtype)
    return torch.nn.functional.embedding(ids, table).to(dtype)


@register_op("soft_cap", kind=ANY_KIND, priority=0, source=_SOURCE)
def soft_cap(x: Tensor, cap: float) -> Tensor:
    """`cap * tanh(x / cap)` (Gemma 2, arXiv:2408.00118): values that come no further than the cap."""
    return torch.tanh(x / cap) * cap


@register_op("rms_norm", kind=ANY_KIND, priority=0, source=_SOURCE)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in float32 inside (Zhang and Sennrich, 2019)."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


@register_op("add_rms_norm", kind=ANY_KIND, priority=0, source=_SOURCE)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`; both `[T, H]`. The inputs may be overwritten."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


@register_op("layer_norm", kind=ANY_KIND, priority=0, source=_SOURCE)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation over the last dimension, in float32 inside (Ba et al., 2016)."""
    wide_bias = None if bias is None else bias.float()
    return torch.nn.functional.layer_norm(x.float(), weight.shape, weight.float(), wide_bias, eps).to(x.dtype)


@register_op("rotary", kind=ANY_KIND, priority=0, source=_SOURCE)
def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate the first R dimensions of q `[T, H, D]` and k `[T, KH, D]`; the rest passes (Su et al., 2021).

    cos and sin `[P, R / 2]` are indexed by `positions [T]`. Pairs are (i, i + R/2), or (2i, 2i + 1) where
    `interleaved`. The inputs may be overwritten.
    """
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1) if rest.shape[-1] else out.to(x.dtype)


@register_op("silu_and_mul", kind=ANY_KIND, priority=0, source=_SOURCE)
def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(gate) * up` of x `[T, 2F]`, gate first, to `[T, F]`; float32 inside (Shazeer, 2020)."""
    gate, up = x.float().chunk(2, dim=-1)
    return (_silu(gate) * up).to(x.dtype)


@register_op("gelu_and_mul", kind=ANY_KIND, priority=0, source=_SOURCE)
def gelu_and_mul(x: Tensor, approximate: Approximation = "none") -> Tensor:
    """`gelu(gate) * up` of x `[T, 2F]`, gate first, to `[T, F]`; float32 inside."""
    gate, up = x.float().chunk(2, dim=-1)
    return (_gelu(gate, approximate) * up).to(x.dtype)


@register_op("gelu", kind=ANY_KIND, priority=0, source=_SOURCE)
def gelu(x: Tensor, approximate: Approximation = "none") -> Tensor:
    """The Gaussian error linear unit, exact or by tanh, float32 inside (Hendrycks and Gimpel, 2016)."""
    return _gelu(x.float(), approximate).to(x.dtype)


# torch.nn.functional.silu and gelu compute the last few elements of a tensor with another exp than the others
# (measured on x86: the last bit differs), so a row's result would depend on where the batch ends. exp, tanh, erf
# and the four basic operations by themselves give every element the same.


def _silu(x: Tensor) -> Tensor:
    return x / (torch.exp(-x) + 1)


def _gelu(x: Tensor, approximate: Approximation) -> Tensor:
    if approximate == "tanh":
        inner = (x * x * x * 0.044715 + x) * math.sqrt(2 / math.pi)
        return (torch.tanh(inner) + 1) * x * 0.5
    return (torch.erf(x * math.sqrt(0.5)) + 1) * x * 0.5
