"""Rotary position embeddings: tables of cosines and sines, made once and shared by the layers of equal spec.

Frequencies follow transformers' `modeling_rope_utils` operation by operation, in float32, so that the tables agree to
the last bit. Scalings whose frequencies depend on the length of the sequence (`dynamic`, `longrope`) are resolved once
with the longest sequence that the engine admits: what a request computes must not depend on how far it has come, or
cached keys would not fit new queries.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sagellm_core.models.spec import RopeScaling, RopeSpec

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import OpTable

__all__ = ["RotaryEmbedding", "inverse_frequencies"]


class RotaryEmbedding:
    """Rotates queries and keys by their positions, 0 <= position < `max_positions`."""

    __slots__ = ("_cos", "_rotary", "_sin")

    def __init__(self, ops: OpTable, spec: RopeSpec, max_positions: int, device: torch.device) -> None:
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(spec, max_positions))
        factor = spec.scaling.attention_factor if spec.scaling else 1.0
        self._rotary = ops.rotary
        self._cos = (angles.cos() * factor).to(device)  # [max_positions, rotary_dim / 2]
        self._sin = (angles.sin() * factor).to(device)

    def __call__(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q [T, H, D] and k [T, KH, D] by positions [T]; their storage may be reused."""
        return self._rotary(q, k, self._cos, self._sin, positions)


def inverse_frequencies(spec: RopeSpec, max_positions: int) -> Tensor:
    """Radians a position for each of the rotary_dim / 2 pairs, float32, for sequences up to `max_positions`."""
    scaling = spec.scaling
    if scaling is None:
        return _plain(spec.theta, spec.rotary_dim)
    if scaling.kind == "linear":
        return _plain(spec.theta, spec.rotary_dim) / scaling.factor
    if scaling.kind == "dynamic":
        return _dynamic(spec, scaling, max_positions)
    if scaling.kind == "llama3":
        return _llama3(spec, scaling)
    if scaling.kind == "yarn":
        return _yarn(spec, scaling)
    return _longrope(spec, scaling, max_positions)


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32) / dim


def _plain(theta: float, dim: int) -> Tensor:
    return 1.0 / (theta ** _exponents(dim))


def _dynamic(spec: RopeSpec, scaling: RopeScaling, max_positions: int) -> Tensor:
    """NTK-aware scaling: a larger base for sequences longer than the trained length."""
    dim, trained = spec.rotary_dim, scaling.original_max_positions
    stretch = scaling.factor * max(max_positions, trained) / trained - (scaling.factor - 1)
    return _plain(spec.theta * stretch ** (dim / (dim - 2)), dim)


def _llama3(spec: RopeSpec, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: low frequencies divided by the factor, high ones kept, a smooth passage between."""
    inv_freq = _plain(spec.theta, spec.rotary_dim)
    trained = scaling.original_max_positions
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / inv_freq
    scaled = torch.where(wavelengths > trained / low, inv_freq / scaling.factor, inv_freq)
    smooth = (trained / wavelengths - low) / (high - low)
    between = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    is_between = ~(wavelengths < trained / high) * ~(wavelengths > trained / low)
    return torch.where(is_between, between, scaled)


def _yarn(spec: RopeSpec, scaling: RopeScaling) -> Tensor:
    """YaRN (https://arxiv.org/abs/2309.00071): interpolated low frequencies, original high ones, a ramp between."""
    dim = spec.rotary_dim
    powers = spec.theta ** _exponents(dim)
    extrapolated, interpolated = 1.0 / powers, 1.0 / (scaling.factor * powers)
    low = _yarn_dimension(scaling.beta_fast, spec, scaling.original_max_positions)
    high = _yarn_dimension(scaling.beta_slow, spec, scaling.original_max_positions)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    return interpolated * (1 - kept) + extrapolated * kept


def _yarn_dimension(num_rotations: float, spec: RopeSpec, trained: int) -> float:
    """The dimension that turns `num_rotations` times over the trained length."""
    turns = math.log(trained / (num_rotations * 2 * math.pi))
    return spec.rotary_dim * turns / (2 * math.log(spec.theta))


def _longrope(spec: RopeSpec, scaling: RopeScaling, max_positions: int) -> Tensor:
    """Phi-3: one divisor a frequency, from one list for short and from another for long sequences."""
    is_long = max_positions > scaling.original_max_positions
    factors = torch.tensor(scaling.long_factors if is_long else scaling.short_factors, dtype=torch.float32)
    return 1.0 / (factors * spec.theta ** _exponents(spec.rotary_dim))
