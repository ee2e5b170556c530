"""How many replicas a model needs: by the load that is coming and by what a replica was measured to carry.

Replicas come when the upper forecast of the load would miss the objectives, or when they are being missed. One goes
when the mean forecast, put on those that stay, keeps well within them (`down_share`), has done so for a while, and
nothing has changed of late. In between lies what keeps the number from swinging.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf
from typing import Protocol

from sagellm_control_plane.autoscaler_config import AutoscalerConfig
from sagellm_control_plane.capacity import (
    Limits,
    Objectives,
    Prediction,
    Workload,
    predict,
    replicas_needed,
)
from sagellm_control_plane.clock import Clock
from sagellm_control_plane.forecast import Forecaster
from sagellm_control_plane.load_meter import LoadMeter, LoadSample
from sagellm_control_plane.step_time import StepCoefficients

logger = logging.getLogger(__name__)

_MIN_ENDED = 10  # requests of an interval from which a correction is learned
_LEARNING = 0.3
_CORRECTIONS = (0.5, 4.0)
_OUT_OF_REACH = 2.0  # an objective that no replica can keep becomes so many times what a request alone takes


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """The replicas of a model at this moment."""

    num_ready: int
    num_starting: int
    num_waiting: int  # requests without a place
    num_context_tokens: int  # of all requests in flight
    coefficients: StepCoefficients  # of one replica, as measured
    limits: Limits
    start_s: float | None = None  # that a replica took to start, last

    @property
    def num_replicas(self) -> int:
        return self.num_ready + self.num_starting


class Replicas(Protocol):
    """The replicas of one model, wherever they run: child processes here, or actors on other nodes."""

    def figures(self) -> ReplicaFigures:
        """As of now."""
        ...

    def grow(self, count: int) -> int:
        """Begin to start so many more; how many these are in fact."""
        ...

    def shrink(self, count: int) -> None:
        """Let so many end their requests and go."""
        ...


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """What was decided, and why. Rates are requests a second; times are predictions for `target`."""

    num_replicas: int
    target: int
    reason: str
    rate: float
    forecast: float
    forecast_high: float
    ttft_s: float
    tpot_s: float


class Autoscaler:
    """Decides every `interval_s`. Belongs to one event loop; `on_decision` is told of every change."""

    def __init__(
        self,
        config: AutoscalerConfig,
        replicas: Replicas,
        meter: LoadMeter,
        clock: Clock,
        on_decision: Callable[[ScalingDecision], None] = lambda decision: None,
    ) -> None:
        self.config = config
        self._replicas = replicas
        self._meter = meter
        self._clock = clock
        self._on_decision = on_decision
        period = None if config.season_s is None else max(2, round(config.season_s / config.interval_s))
        self._forecaster = Forecaster(self._horizon(None), period=period)
        self._ttft_correction = _Correction()
        self._tpot_correction = _Correction()
        self._num_misses = 0  # intervals in a row
        self._fewer_since: float | None = None  # fewer replicas would do
        self._was_out_of_reach = False
        self._changed_at = -inf

    async def run(self) -> None:
        """Decide until cancelled."""
        while True:
            await self._clock.sleep(self.config.interval_s)
            self.step()

    def step(self) -> ScalingDecision | None:
        """Close the interval, decide and act; None while there is nothing to decide by."""
        now = self._clock.now()
        sample, figures = self._meter.close(now), self._replicas.figures()
        self._forecaster.observe(sample.rate)
        decision = self._bring_to_minimum(figures, sample) or self._decide(sample, figures, now)
        if decision is None or decision.target == decision.num_replicas:
            return decision
        if decision.target < decision.num_replicas:
            self._replicas.shrink(decision.num_replicas - decision.target)
        elif not self._replicas.grow(decision.target - decision.num_replicas):
            return decision
        self._changed_at, self._fewer_since = now, None
        logger.info("%d -> %d replicas: %s", decision.num_replicas, decision.target, decision.reason)
        self._on_decision(decision)
        return decision

    # ---- steps of the above ---------------------------------------------------------------------------

    def _bring_to_minimum(self, figures: ReplicaFigures, sample: LoadSample) -> ScalingDecision | None:
        number, least = figures.num_replicas, self.config.min_replicas
        if number >= least:
            return None
        return ScalingDecision(number, least, f"min_replicas is {least}", sample.rate, 0.0, 0.0, 0.0, 0.0)

    def _decide(self, sample: LoadSample, figures: ReplicaFigures, now: float) -> ScalingDecision | None:
        workload = sample.workload
        if workload is None:
            return None
        self._learn(sample, figures, workload)
        mean, high = self._forecaster.mean(), self._forecaster.quantile(self.config.load_quantile)
        high = max(high, mean)
        number = figures.num_replicas

        def at(count: int, rate: float) -> Prediction:
            return self._corrected(rate / count, figures, workload)

        def decision(target: int, reason: str, rate: float) -> ScalingDecision:
            expected = at(max(1, target), rate)
            return ScalingDecision(number, target, reason, sample.rate, mean, high, expected.ttft_s, expected.tpot_s)

        # However many replicas there are, a request takes as long as it takes with one to itself.
        alone, most = at(1, 0.0), self.config.max_replicas
        objectives = self._reachable(alone)
        needed = replicas_needed(lambda count: at(count, high).meets(objectives), most)
        if needed > number:
            target = min(needed, number + self.config.max_step)
            return decision(target, f"{high:.2f} requests/s may come, too many for {number}", high)
        if self._misses(sample, figures, objectives) and not figures.num_starting and number < most:
            self._num_misses = 0
            return decision(number + 1, "the objectives are being missed", high)
        if self._may_shrink(at, figures, now, mean, high, objectives):
            return decision(number - 1, f"{number - 1} carry the {mean:.2f} requests/s that are expected", mean)
        return decision(number, "enough", high)

    def _reachable(self, alone: Prediction) -> Objectives:
        """The objectives, with what a request alone takes, and some more, in the place of those below it."""
        asked = self.config.objectives
        ttft_s = asked.ttft_s if alone.ttft_s < asked.ttft_s else _OUT_OF_REACH * alone.ttft_s
        tpot_s = asked.tpot_s if alone.tpot_s < asked.tpot_s else _OUT_OF_REACH * alone.tpot_s
        objectives = Objectives(ttft_s, tpot_s, asked.quantile)
        if objectives != asked and not self._was_out_of_reach:
            self._was_out_of_reach = True  # said once: it may come and go with the load
            logger.warning(
                "a request alone takes %.0f ms to its first token and %.1f ms for each further: the objectives are out "
                "of reach for any number of replicas",
                1e3 * alone.ttft_s,
                1e3 * alone.tpot_s,
            )
        return objectives

    def _may_shrink(
        self,
        at: Callable[[int, float], Prediction],
        figures: ReplicaFigures,
        now: float,
        mean: float,
        high: float,
        objectives: Objectives,
    ) -> bool:
        """Whether those that stay carry the load, and what is in flight now, with a margin; for long enough."""
        config, fewer, alone = self.config, figures.num_replicas - 1, at(1, 0.0)
        is_enough = (
            fewer >= config.min_replicas
            and not figures.num_starting
            and not figures.num_waiting
            and not self._num_misses
            and at(fewer, mean).meets(_within(objectives, alone, config.down_share))
            and at(fewer, high).meets(_within(objectives, alone, (1 + config.down_share) / 2))
            and figures.num_context_tokens <= config.down_share * fewer * figures.limits.num_kv_tokens
        )
        if not is_enough:
            self._fewer_since = None
            return False
        if self._fewer_since is None:
            self._fewer_since = now
        return now - self._fewer_since >= config.down_after_s and now - self._changed_at >= config.cool_down_s

    def _misses(self, sample: LoadSample, figures: ReplicaFigures, objectives: Objectives) -> bool:
        """Whether the objectives were missed for several intervals, whatever the model says."""
        is_late = sample.ttft_s is not None and sample.ttft_s > objectives.ttft_s
        is_slow = sample.tpot_s is not None and sample.tpot_s > objectives.tpot_s
        is_stuck = not sample.num_ended and figures.num_waiting > 0
        self._num_misses = self._num_misses + 1 if is_late or is_slow or is_stuck else 0
        return self._num_misses >= self.config.misses_to_grow

    def _learn(self, sample: LoadSample, figures: ReplicaFigures, workload: Workload) -> None:
        """Compare what was predicted for this load with what came."""
        if sample.num_ended < _MIN_ENDED or not figures.num_ready or figures.num_starting:
            return
        rate = sample.rate / figures.num_ready
        expected = predict(rate, workload, figures.coefficients, figures.limits, quantile=self.config.quantile)
        self._ttft_correction.learn(sample.ttft_s, expected.ttft_s)
        self._tpot_correction.learn(sample.tpot_s, expected.tpot_s)
        self._forecaster.look_ahead(self._horizon(figures.start_s))

    def _corrected(self, rate: float, figures: ReplicaFigures, workload: Workload) -> Prediction:
        expected = predict(rate, workload, figures.coefficients, figures.limits, quantile=self.config.quantile)
        return Prediction(
            expected.ttft_s * self._ttft_correction.factor,
            expected.tpot_s * self._tpot_correction.factor,
            expected.num_running,
            expected.utilization,
        )

    def _horizon(self, start_s: float | None) -> int:
        """Intervals until a replica that is started now takes requests."""
        return 1 + ceil(max(self.config.lead_s, start_s or 0.0) / self.config.interval_s)


def _within(objectives: Objectives, alone: Prediction, share: float) -> Objectives:
    """A share of the objectives; of what is left of them over a request alone, where that has the whole share."""

    def part(asked: float, least: float) -> float:
        return share * asked if least <= share * asked else least + share * (asked - least)

    ttft_s, tpot_s = part(objectives.ttft_s, alone.ttft_s), part(objectives.tpot_s, alone.tpot_s)
    return Objectives(ttft_s, tpot_s, objectives.quantile)


class _Correction:
    """How much longer things take than predicted, of late; overload teaches nothing."""

    def __init__(self) -> None:
        self.factor = 1.0

    def learn(self, measured: float | None, predicted: float) -> None:
        if measured is None or predicted == inf or predicted <= 0:
            return
        low, high = _CORRECTIONS
        ratio = min(max(measured / predicted, low), high)
        self.factor += _LEARNING * (ratio - self.factor)
