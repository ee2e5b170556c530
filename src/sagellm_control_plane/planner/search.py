"""The layouts that a model could have on a cluster, what each would reach, and the one to take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log

from sagellm_control_plane.config import ParallelismConfig
from sagellm_control_plane.planner.hardware import Cluster
from sagellm_control_plane.planner.model_costs import ModelCosts
from sagellm_control_plane.planner.roofline import Engine, Layout, Roofline, StepParts
from sagellm_protocol import InvalidArgumentError

_MAX_BATCH = 1024  # sequences of one replica
_GROWTH = 1.15  # between two batch sizes that are looked at
_QUANTILE = 0.9  # of the first tokens that shall come in time
_TOKENS_PER_STEP = 2048
_MAX_NODES = 16  # of one replica


@dataclass(frozen=True, slots=True)
class Objectives:
    """What the service shall keep, and the requests that it gets. None is no limit.

    A first token is in time for 90 % of the requests; the time between tokens is the mean.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    num_input_tokens: int = 1024
    num_output_tokens: int = 256
    hit_rate: float = 0.0  # share of the prompt that a prefix cache holds

    def __post_init__(self) -> None:
        for field in ("ttft_ms", "tpot_ms"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise InvalidArgumentError(f"{field} must be more than 0, is {value}", field=field)
        for field in ("num_input_tokens", "num_output_tokens"):
            if not 1 <= getattr(self, field) <= 2**24:
                raise InvalidArgumentError(f"{field} must be 1 to {2**24}, is {getattr(self, field)}", field=field)
        if not 0 <= self.hit_rate < 1:
            raise InvalidArgumentError(
                f"hit_rate must be 0 or more and less than 1, is {self.hit_rate}", field="hit_rate"
            )

    @property
    def num_uncached_tokens(self) -> int:
        """Prompt tokens that are computed."""
        return max(1, round(self.num_input_tokens * (1 - self.hit_rate)))


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a layout reaches at the highest load that keeps the objectives, or at its lightest where it can't."""

    layout: Layout
    is_good: bool  # whether the objectives are kept
    batch_size: int  # decoding sequences of one replica
    ttft_ms: float  # 90 % of the first tokens come sooner
    tpot_ms: float
    requests_per_s: float  # of the whole cluster
    tokens_per_s: float  # output tokens of the whole cluster
    tokens_per_s_per_device: float  # of all devices of the cluster, used or not
    num_kv_tokens: int  # of one replica
    weights_gib: float  # of one device
    step: StepParts  # of decoding

    def dominates(self, other: Estimate) -> bool:
        """Whether it is nowhere worse and somewhere better."""
        mine = (self.tokens_per_s_per_device, -self.tpot_ms, -self.ttft_ms)
        theirs = (other.tokens_per_s_per_device, -other.tpot_ms, -other.ttft_ms)
        return mine != theirs and all(own >= others for own, others in zip(mine, theirs, strict=True))


@dataclass(frozen=True, slots=True)
class Plan:
    """The layout to take, all that fit (best first), and why the others don't."""

    model: ModelCosts
    cluster: Cluster
    objectives: Objectives
    best: Estimate
    estimates: list[Estimate]
    rejected: dict[str, str]  # by layout

    @property
    def pareto(self) -> list[Estimate]:
        """Those that no other beats in throughput, time between tokens and first token at once."""
        return [item for item in self.estimates if not any(other.dominates(item) for other in self.estimates)]


def make_plan(
    model: ModelCosts,
    cluster: Cluster,
    objectives: Objectives | None = None,
    config: ParallelismConfig | None = None,
    engine: Engine | None = None,
) -> Plan:
    """The layout with the most tokens a second that keeps the objectives; else the one that misses them by least.

    `config` says which kinds of parallelism may be used; with `auto_optimize` off, the first layout that fits is taken:
    fewest devices a replica, and as many replicas as there is room for.

    Raises `InvalidArgumentError` where nothing fits; the message says how much memory is missing.
    """
    objectives, config = objectives or Objectives(), config or ParallelismConfig()
    estimates, rejected, least_missing = [], {}, float("inf")
    for layout in _layouts(model, cluster, config):
        roofline = Roofline(model, cluster.device, layout, engine)
        num_kv_tokens = roofline.num_kv_tokens(max_num_batched_tokens=_TOKENS_PER_STEP)
        needed = objectives.num_input_tokens + objectives.num_output_tokens
        if num_kv_tokens < needed:
            missing = (needed - num_kv_tokens) * roofline.kv_bytes_per_token / layout.adp / 2**30
            weights = f"{roofline.weight_bytes / 2**30:.1f} GiB of weights"
            rejected[str(layout)] = f"{missing:.1f} GiB a device are missing for {weights} and one request"
            least_missing = min(least_missing, missing)
            continue
        estimates.append(_estimate(roofline, cluster, objectives, num_kv_tokens))
    if not estimates:
        raise InvalidArgumentError(
            f"{model.name} ({model.num_params / 1e9:.1f} B parameters, {model.weight_dtype}) does not fit on "
            f"{cluster}: the best layout lacks {least_missing:.1f} GiB a device; take more devices, shorter requests, "
            "--weights float8 or int4, or allow more kinds of parallelism",
            field="gpus",
        )
    if config.auto_optimize:
        estimates.sort(key=lambda item: _rank(item, objectives))
    return Plan(model, cluster, objectives, estimates[0], estimates, rejected)


# ---- the layouts --------------------------------------------------------------------------------------------


def _layouts(model: ModelCosts, cluster: Cluster, config: ParallelismConfig) -> Iterator[Layout]:
    """Every layout that the model and the configuration allow, small replicas first."""
    allowed = set(config.supported_strategies)
    node = cluster.device.devices_per_node
    sizes = [*range(1, node + 1), *range(2 * node, _MAX_NODES * node + 1, node)]
    for size in (size for size in sizes if size <= cluster.num_devices):
        num_replicas = cluster.num_devices // size
        for tp in _divisors(size):
            for adp in _divisors(size // tp):
                pp = size // tp // adp
                for ep in _divisors(tp * adp) if model.num_experts else (1,):
                    layout = Layout(tp, pp, num_replicas, ep, adp)
                    if "DP" not in allowed:
                        layout = replace(layout, dp=1)
                    if layout.strategies <= allowed and _is_possible(layout, model, cluster):
                        yield layout


def _is_possible(layout: Layout, model: ModelCosts, cluster: Cluster) -> bool:
    """Heads, layers and experts can be shared out, and what talks at every layer sits in one node."""
    heads = model.num_heads % layout.tp == 0
    # Heads of keys and values are shared out, or each is kept on several devices.
    kv_heads = bool(model.latent_dim) or model.num_kv_heads % layout.tp == 0 or layout.tp % model.num_kv_heads == 0
    layers = layout.pp == 1 or model.num_layers % layout.pp == 0
    if model.num_experts:
        experts = model.num_experts % layout.ep == 0 and (layout.ep > 1 or layout.adp == 1)
    else:
        experts = layout.ep == layout.adp == 1
    return heads and kv_heads and layers and experts and layout.tp <= cluster.device.devices_per_node


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


# ---- what a layout reaches ----------------------------------------------------------------------------------


def _estimate(roofline: Roofline, cluster: Cluster, objectives: Objectives, num_kv_tokens: int) -> Estimate:
    """The largest batch that keeps the objectives; a batch of one where none does."""
    chosen = _at(roofline, cluster, objectives, num_kv_tokens, 1)
    size = 1.0
    while chosen.is_good:
        size = max(size + 1, size * _GROWTH)
        num_tokens = int(size) * (objectives.num_input_tokens + objectives.num_output_tokens)
        if size > _MAX_BATCH or num_tokens > num_kv_tokens:
            break
        larger = _at(roofline, cluster, objectives, num_kv_tokens, int(size))
        if not larger.is_good:
            break
        chosen = larger
    return chosen


def _at(roofline: Roofline, cluster: Cluster, objectives: Objectives, num_kv_tokens: int, batch_size: int) -> Estimate:
    """At the load that keeps `batch_size` sequences of a replica decoding.

    Each request keeps the replica busy for its prefill and for its share of the steps of decoding; between two tokens
    of a sequence lie a step and the prefills of those that came meanwhile. Prefills wait for one another: by Kingman's
    formula for Poisson arrivals and service times that vary little, with an exponential tail.
    """
    layout, num_output = roofline.layout, objectives.num_output_tokens
    uncached = objectives.num_uncached_tokens
    cached = objectives.num_input_tokens - uncached
    step = roofline.decode(batch_size, objectives.num_input_tokens + num_output / 2)
    own_s = roofline.prefill(uncached, num_cached_tokens=cached).total
    busy_s = roofline.prefill_busy_s(uncached, num_cached_tokens=cached, tokens_per_step=_TOKENS_PER_STEP)
    tpot_s = step.total + batch_size * busy_s / num_output
    rate = batch_size / (num_output * tpot_s)  # requests a second of a replica, by Little's law
    load = min(rate * busy_s, 0.999)
    mean_wait_s = load / (1 - load) * busy_s * (1 + 0.25) / 2
    wait_s = max(0.0, mean_wait_s / load * log(load / (1 - _QUANTILE))) if load > 0 else 0.0
    ttft_s = own_s + wait_s + step.total / 2  # the step that runs when it comes ends first
    ttft_ms, tpot_ms = 1e3 * ttft_s, 1e3 * tpot_s
    is_good = _missed(ttft_ms, objectives.ttft_ms) <= 1 and _missed(tpot_ms, objectives.tpot_ms) <= 1
    return Estimate(
        layout,
        is_good,
        batch_size,
        ttft_ms,
        tpot_ms,
        layout.dp * rate,
        layout.dp * rate * num_output,
        layout.dp * rate * num_output / cluster.num_devices,
        num_kv_tokens,
        roofline.weight_bytes / 2**30,
        step,
    )


def _missed(value: float, limit: float | None) -> float:
    """A time as a share of its limit."""
    return 0.0 if limit is None else value / limit


def _rank(item: Estimate, objectives: Objectives) -> tuple[float, ...]:
    """Lowest first."""
    if item.is_good:
        return (0, -item.tokens_per_s, item.tpot_ms, item.layout.devices_per_replica)
    worst = max(_missed(item.ttft_ms, objectives.ttft_ms), _missed(item.tpot_ms, objectives.tpot_ms))
    return (1, worst, -item.tokens_per_s)
