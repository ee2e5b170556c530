"""Options of the life of engines: when one counts as lost, how it comes back, how long it stays in memory."""

from __future__ import annotations

from pydantic import Field

from sagellm_protocol.model import EdgeModel


class BreakerConfig(EdgeModel):
    """When an engine whose requests fail is left alone for a while."""

    failures_to_open: int = Field(default=5, ge=1, description="failures, at least half of the outcomes, that open it")
    window_s: float = Field(default=30.0, gt=0, description="how long an outcome counts")
    open_s: float = Field(default=5.0, gt=0, description="first pause; doubles with each trial that fails")
    max_open_s: float = Field(default=60.0, gt=0)
    trial_interval_s: float = Field(default=1.0, gt=0, description="after the pause, one request in so many seconds")
    successes_to_close: int = Field(default=2, ge=1, description="trials in a row that must succeed")


class LifecycleConfig(EdgeModel):
    """How engines are watched, restarted and unloaded."""

    hang_timeout_s: float = Field(default=10.0, gt=0, description="without a sign of life, until an engine is lost")
    stall_timeout_s: float = Field(default=120.0, gt=0, description="with requests and without a step, likewise")
    probe_interval_s: float = Field(default=2.0, gt=0, description="of silence until a health check, ±20 %")
    probe_timeout_s: float = Field(default=2.0, gt=0)
    probes_to_lose: int = Field(default=2, ge=1, description="health checks in a row that must fail as well")
    signs_to_recover: int = Field(default=2, ge=1, description="signs of life until a silent engine is trusted again")
    tick_s: float = Field(default=0.25, gt=0, description="how often all this is looked at")

    start_timeout_s: float = Field(default=1800.0, gt=0, description="most that loading may take")
    stop_timeout_s: float = Field(default=30.0, gt=0, description="most that stopping may take; then a child is killed")
    restart_backoff_s: float = Field(default=0.5, gt=0, description="pause before the first restart; doubles each time")
    max_restart_backoff_s: float = Field(default=60.0, gt=0)
    max_restarts: int = Field(default=8, ge=0, description="restarts in a row without any work done: a crash loop")
    stable_after_s: float = Field(default=60.0, gt=0, description="of being ready, after which failures are forgotten")

    idle_unload_s: float | None = Field(default=None, gt=0, description="without requests until unloaded; None: never")
    memory_budget_bytes: int | None = Field(default=None, ge=1, description="for all loaded models; None: no limit")
    swap_patience_s: float = Field(default=10.0, ge=0, description="a model waits so long for others' running requests")

    breaker: BreakerConfig = Field(default_factory=BreakerConfig)
