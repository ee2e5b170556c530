"""What a simulated run comes to: latencies, hits and goodput, as plain figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from sagellm_benchmark.simulator.simulation import SimulationConfig, SimulationResult

GOODPUT_TTFT_S = 2.0  # the limits that simulators of the field use, where nothing else is said
GOODPUT_TPOT_S = 0.1


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """One run. Times in milliseconds, shares from 0 to 1.

    `goodput` is the share of requests within both limits. `ttft_error` is the median of |predicted - real| / real of
    the times to the first token that the router expected; None where it expects none.
    """

    router: str
    policy: str
    num_requests: int
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    e2e_ms: dict[str, float]
    hit_rate: float  # of prompt tokens
    goodput: float
    utilization: float  # of the engines' time
    requests_per_s: float
    ttft_error: float | None


def summarize(
    result: SimulationResult,
    config: SimulationConfig,
    *,
    ttft_s: float = GOODPUT_TTFT_S,
    tpot_s: float = GOODPUT_TPOT_S,
) -> SimulationReport:
    """The figures of one run; `ttft_s` and `tpot_s` are the limits of its goodput."""
    outcomes = result.outcomes
    ttft = np.array([outcome.ttft_s for outcome in outcomes])
    tpot = np.array([outcome.tpot_s for outcome in outcomes])
    predicted = [
        abs(outcome.predicted_ttft_s - outcome.ttft_s) / outcome.ttft_s
        for outcome in outcomes
        if outcome.predicted_ttft_s is not None
    ]
    num_prompt_tokens = sum(outcome.num_prompt_tokens for outcome in outcomes)
    return SimulationReport(
        router=config.router,
        policy=config.policy,
        num_requests=len(outcomes),
        ttft_ms=_quantiles(ttft),
        tpot_ms=_quantiles(tpot),
        e2e_ms=_quantiles(np.array([outcome.e2e_s for outcome in outcomes])),
        hit_rate=sum(outcome.num_cached_tokens for outcome in outcomes) / num_prompt_tokens,
        goodput=float(np.mean((ttft <= ttft_s) & (tpot <= tpot_s))),
        utilization=result.utilization,
        requests_per_s=len(outcomes) / max(result.duration_s, 1e-9),
        ttft_error=float(np.median(predicted)) if predicted else None,
    )


def as_json(config: SimulationConfig, reports: Sequence[SimulationReport], trace: str) -> Mapping[str, object]:
    """Configuration and figures as plain JSON values."""
    told = asdict(config)
    del told["router"], told["policy"]
    told["slo"] = None if config.slo is None else config.slo.model_dump(exclude_none=True)
    return {"trace": trace, "config": told, "runs": [asdict(report) for report in reports]}


def _quantiles(seconds: NDArray[np.float64]) -> dict[str, float]:
    """Mean and quantiles in milliseconds."""
    figures = {"mean": float(seconds.mean())}
    figures |= {f"p{share}": float(np.quantile(seconds, share / 100)) for share in (50, 90, 99)}
    return {name: value * 1e3 for name, value in figures.items()}
