"""Configuration of the control plane."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from sagellm_protocol.model import EdgeModel

RoutingName = Literal["adaptive", "least_loaded", "round_robin"]
ParallelStrategy = Literal["TP", "PP", "DP", "EP", "Hybrid"]


class PDSeparationConfig(EdgeModel):
    """Which instances long and short prompts prefer.

    Prompts of at least `prefilling_threshold_input_tokens` go to PREFILLING instances, shorter ones to DECODING
    instances, where such instances are free. A request stays whole on its instance.
    """

    enabled: bool = True
    routing_policy: RoutingName = "adaptive"
    prefilling_threshold_input_tokens: int = Field(default=800, ge=1)


class ParallelismConfig(EdgeModel):
    """Which kinds of parallelism a planner may choose from. Engines in this process run on one device: no effect."""

    auto_optimize: bool = True
    supported_strategies: list[ParallelStrategy] = Field(default_factory=lambda: list(get_args(ParallelStrategy)))
