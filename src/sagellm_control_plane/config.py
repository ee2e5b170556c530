"""Configuration of the control plane."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from sagellm_control_plane.autoscaler_config import AutoscalerConfig
from sagellm_control_plane.lifecycle_config import LifecycleConfig
from sagellm_control_plane.policies import PolicyOptions
from sagellm_control_plane.quotas import QuotaConfig
from sagellm_protocol.model import EdgeModel

ParallelStrategy = Literal["TP", "PP", "DP", "EP", "Hybrid"]


class PDSeparationConfig(EdgeModel):
    """Which instances long and short prompts go to, where instances of both kinds serve a model.

    Prompts of fewer than `prefilling_threshold_input_tokens` stay on a DECODING instance. A longer one is computed by a
    PREFILLING instance, which hands the KV cache over to the DECODING instance that makes the answer, wherever that
    brings the first token earlier than computing it there; the harm to the requests that decode there counts. Engines
    that cannot hand over keep a request whole: long prompts on PREFILLING, short ones on DECODING instances. An
    instance of the other kind serves rather than let a request wait.
    """

    enabled: bool = True
    routing_policy: str = Field(default="adaptive", description="a name of `list_routers()`")
    prefilling_threshold_input_tokens: int = Field(default=800, ge=1)
    hand_over_overhead_s: float = Field(default=2e-3, ge=0, description="of one hand-over, whatever its size")
    hand_over_s_per_token: float = Field(
        default=10e-6, ge=0, description="first guess; corrected by every hand-over that was measured"
    )


class ParallelismConfig(EdgeModel):
    """What `planner.make_plan` may choose from. Engines in this process run on one device, whatever it says."""

    auto_optimize: bool = Field(
        default=True, description="off: the smallest layout that fits, as often as there is room"
    )
    supported_strategies: list[ParallelStrategy] = Field(
        default_factory=lambda: list(get_args(ParallelStrategy)), description="Hybrid: several of the others together"
    )


class FailoverConfig(EdgeModel):
    """What becomes of the requests of an engine that dies, hangs or loses its connection.

    They go on elsewhere behind the last token that was delivered. A request that loses `max_losses` engines in a row
    without having got further on any but the first is refused as poison if nobody else there had lost one before;
    otherwise it runs on alone, and one more condemns it. Engines that are drained, or that a signal from outside
    ended or stopped, don't count.
    """

    enabled: bool = Field(default=True, description="off: such requests end with an error")
    max_moves: int = Field(default=32, ge=0, description="of one request in a row, without a token made in between")
    max_losses: int = Field(default=2, ge=1, description="of engines in a row, without getting any further: poison")


class ControlPlaneConfig(EdgeModel):
    """Everything that the control plane can be told; each part has usable defaults."""

    scheduling_policy: str = Field(default="fifo", description="a name of `list_policies()`")
    routing_policy: str | None = Field(
        default=None, description="a name of `list_routers()`; None: adaptive, or what the PD separation names"
    )
    policy_options: PolicyOptions = Field(default_factory=PolicyOptions)
    max_num_waiting: int = Field(default=4096, ge=0, description="requests in the queue before new ones are refused")
    refuse_hopeless: bool = Field(
        default=True, description="refuse a request at once whose deadline is predicted to pass before its first token"
    )
    quotas: QuotaConfig = Field(default_factory=QuotaConfig, description="what each tenant may use")
    failover: FailoverConfig = Field(default_factory=FailoverConfig)
    lifecycle: LifecycleConfig = Field(default_factory=LifecycleConfig)
    autoscaling: dict[str, AutoscalerConfig] = Field(
        default_factory=dict, description="the models whose number of engines follows their load"
    )
    pd: PDSeparationConfig | None = Field(default=None, description="None: no separation of prefill and decode")
    abort_grace_s: float = Field(
        default=5.0, gt=0, description="an engine has so long to end a request that is past its deadline"
    )
    max_cached_blocks: int = Field(default=4_000_000, ge=0, description="that the index of prefix caches may know")
    num_traces: int = Field(default=4096, ge=0, description="requests whose explanation is kept")
    num_events: int = Field(default=4096, ge=1, description="events that are kept for readers")
    location: str = Field(default="", description="where this process runs, as zone/rack/host, for routing `topology`")
    seed: int = Field(default=0, ge=0, description="of everything that is drawn at random")
