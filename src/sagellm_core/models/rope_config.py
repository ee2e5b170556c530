"""Rotary positions as configurations write them, in all the ways they are written, -> `RopeSpec`.

Up to transformers 4 a configuration holds `rope_theta`, `rope_scaling` and `partial_rotary_factor`; from 5 on one
object `rope_parameters`, or one object a layer type inside it. Both are read here; defaults follow transformers.
"""

from __future__ import annotations

import math

from sagellm_protocol.errors import UnsupportedError

from .hf_config import HFConfig
from .spec import RopeScaling, RopeScalingKind, RopeSpec

__all__ = ["reachable_positions", "read_rope"]

_KINDS: dict[str, RopeScalingKind] = {
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",  # the first name of longrope
}


def read_rope(
    config: HFConfig,
    head_dim: int,
    *,
    default_theta: float = 10_000.0,
    default_partial: float = 1.0,
    layer_type: str | None = None,
) -> RopeSpec:
    """The rotary specification of `config`, for layers of `layer_type` where the configuration tells them apart.

    Raises `UnsupportedError` for an unknown kind of scaling and `InvalidArgumentError` for a malformed field.
    """
    rope = _parameters(config, layer_type)
    theta = rope.number("rope_theta", default=config.number("rope_theta", "rotary_emb_base", default=default_theta))
    partial = rope.number(
        "partial_rotary_factor",
        default=config.number("partial_rotary_factor", "rotary_pct", default=default_partial),
    )
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim > head_dim or rotary_dim % 2:
        raise config.error("partial_rotary_factor", f"must give an even rotary width <= {head_dim}, got {rotary_dim}")
    return RopeSpec(theta, rotary_dim, _read_scaling(config, rope, rotary_dim))


def reachable_positions(max_position_embeddings: int, rope: RopeSpec | None) -> int:
    """How many positions a model can be run on, given what its configuration calls `max_position_embeddings`.

    Dynamic and YaRN scaling are often switched on by adding `rope_scaling` alone, with the trained length left in
    `max_position_embeddings`; the scaled length is then the factor times the trained one.
    """
    scaling = None if rope is None else rope.scaling
    if scaling is None or scaling.kind not in ("dynamic", "yarn"):
        return max_position_embeddings
    return max(max_position_embeddings, int(scaling.factor * scaling.original_max_positions))


def _parameters(config: HFConfig, layer_type: str | None) -> HFConfig:
    """The object that holds the rope fields; empty where the configuration has none."""
    rope = config.section("rope_scaling") or config.section("rope_parameters")
    if rope is None:
        return HFConfig({}, config.path)
    if layer_type is not None and any(isinstance(value, dict) for value in rope.values.values()):
        return rope.section(layer_type) or HFConfig({}, config.path)
    return rope


def _read_scaling(config: HFConfig, rope: HFConfig, rotary_dim: int) -> RopeScaling | None:
    name = rope.text("rope_type", "type", default="default")
    if name == "default":
        return None
    if name not in _KINDS:
        raise UnsupportedError(
            f"{config.path}: rope type {name!r} is not supported; supported: default, {', '.join(sorted(_KINDS))}",
            field="rope_type",
        )
    kind = _KINDS[name]
    max_positions = config.size("max_position_embeddings")
    # Phi-3 keeps the trained length outside the rope object, and there it has priority.
    original = config.size(
        "original_max_position_embeddings",
        default=rope.size("original_max_position_embeddings", default=max_positions),
    )
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, rope.number("factor"), max_positions)
    if kind == "llama3":
        return RopeScaling(
            kind,
            rope.number("factor"),
            original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    factor = rope.number("factor", default=max_positions / original)
    if kind == "yarn":
        return _yarn(rope, factor, original)
    return RopeScaling(
        kind,
        factor,
        original,
        attention_factor=rope.number("attention_factor", default=_longrope_attention_factor(factor, original)),
        short_factors=_factors(rope, "short_factor", rotary_dim),
        long_factors=_factors(rope, "long_factor", rotary_dim),
    )


def _yarn(rope: HFConfig, factor: float, original: int) -> RopeScaling:
    mscale, mscale_all = rope.number("mscale", default=0.0), rope.number("mscale_all_dim", default=0.0)
    if mscale and mscale_all:
        attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
    else:
        attention_factor = _yarn_mscale(factor, 1.0)
    return RopeScaling(
        "yarn",
        factor,
        original,
        attention_factor=rope.number("attention_factor", default=attention_factor),
        beta_fast=rope.number("beta_fast", default=32.0) or 32.0,
        beta_slow=rope.number("beta_slow", default=1.0) or 1.0,
        truncate=rope.flag("truncate", True),
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope_attention_factor(factor: float, original: int) -> float:
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _factors(rope: HFConfig, name: str, rotary_dim: int) -> tuple[float, ...]:
    values = rope.sequence(name) or []
    if len(values) != rotary_dim // 2 or not all(isinstance(value, (int, float)) for value in values):
        raise rope.error(name, f"must be a list of {rotary_dim // 2} numbers, got {len(values)} values")
    return tuple(float(value) for value in values)
