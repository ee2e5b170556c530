"""Options of the autoscaler of one model."""

from __future__ import annotations

from pydantic import Field, model_validator

from sagellm_control_plane.capacity import Objectives
from sagellm_protocol.model import EdgeModel


class AutoscalerConfig(EdgeModel):
    """How many replicas a model may have, what they are to achieve, and how readily their number changes."""

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=8, ge=1)
    ttft_ms: float = Field(default=500.0, gt=0, description="time to the first token that `quantile` of requests get")
    tpot_ms: float = Field(default=50.0, gt=0, description="time per token after it, likewise")
    quantile: float = Field(default=0.9, gt=0, lt=1)

    interval_s: float = Field(default=5.0, gt=0, description="how often load is measured and a decision made")
    lead_s: float = Field(default=30.0, ge=0, description="how far ahead to look; starts that took longer stretch it")
    season_s: float | None = Field(default=None, gt=0, description="after which load repeats, 86400 for a day")
    load_quantile: float = Field(default=0.9, gt=0, lt=1, description="of the forecast that must be met")

    down_share: float = Field(default=0.8, gt=0, le=1, description="of the objectives, kept by the replicas that stay")
    down_after_s: float = Field(default=120.0, ge=0, description="for which fewer replicas must have been enough")
    cool_down_s: float = Field(default=60.0, ge=0, description="after a change, before replicas are taken away")
    max_step: int = Field(default=8, ge=1, description="replicas that come at once")
    misses_to_grow: int = Field(default=2, ge=1, description="intervals of missed objectives; then one more comes")

    @model_validator(mode="after")
    def _check_range(self) -> AutoscalerConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})")
        return self

    @property
    def objectives(self) -> Objectives:
        """As seconds."""
        return Objectives(self.ttft_ms / 1e3, self.tpot_ms / 1e3, self.quantile)
