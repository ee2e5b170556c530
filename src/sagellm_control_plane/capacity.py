"""What one replica carries: times to tokens at a given load, from its measured step times, queueing included.

With λ requests a second, of m prompt tokens (p of them not cached) and o output tokens, on an engine whose steps take
T = c0 + a·P + q·A + k·KV + b·B (see `step_time`), and κ = k·(m + o/2) + b for each sequence that decodes:

- prefills take the share ρ_p = λ·(a·p + q·p·(m − p/2)) of the time; decoding goes on in the rest;
- by Little's law N = λ·o·t sequences decode, with t = (c0 + κ·N)/(1 − ρ_p) between two tokens;
  so N = λ·o·c0 / (1 − ρ_p − λ·o·κ): without a positive denominator no queue ever ends;
- prefills queue for the token budget of the steps. By Kingman (The single server queue in heavy traffic, 1961) the mean
  wait is ρ/(1 − ρ)·(c_a² + c_s²)/2·s; its tail is taken as exponential, P(W > w) = ρ·exp(−ρ·w/W).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf, log

from sagellm_control_plane.step_time import StepCoefficients


@dataclass(frozen=True, slots=True)
class Workload:
    """What requests are like, on the mean. The squared coefficients of variation are 1 for a Poisson process."""

    num_prompt_tokens: float
    num_uncached_tokens: float
    num_output_tokens: float
    num_uncached_tokens_high: float  # at the objectives' quantile
    arrival_scv: float = 1.0  # c_a², of the times between arrivals
    service_scv: float = 1.0  # c_s², of prefill times


@dataclass(frozen=True, slots=True)
class Limits:
    """What one replica can hold."""

    max_num_running: int = 32
    max_num_batched_tokens: int = 2048  # prompt tokens of a step
    num_kv_tokens: float = inf


@dataclass(frozen=True, slots=True)
class Objectives:
    """What `quantile` of the requests are to get, in seconds: time to the first token, time per token after it."""

    ttft_s: float
    tpot_s: float
    quantile: float = 0.9


@dataclass(frozen=True, slots=True)
class Prediction:
    """One replica at a given load. Times are infinite where it cannot keep up."""

    ttft_s: float
    tpot_s: float
    num_running: float
    utilization: float  # of the prefill queue

    def meets(self, objectives: Objectives, share: float = 1.0) -> bool:
        """Whether it stays within that share of the objectives."""
        return self.ttft_s <= share * objectives.ttft_s and self.tpot_s <= share * objectives.tpot_s


_OVERLOADED = Prediction(inf, inf, inf, inf)


def predict(
    rate: float, workload: Workload, step: StepCoefficients, limits: Limits, *, quantile: float = 0.9
) -> Prediction:
    """What a replica does with `rate` requests a second."""
    prompt, uncached, output = workload.num_prompt_tokens, workload.num_uncached_tokens, workload.num_output_tokens
    context = prompt + output / 2
    per_sequence = step.k * context + step.b
    prefill_s = _compute_s(step, prompt, uncached)
    prefill_share = rate * prefill_s
    left = 1 - prefill_share - rate * output * per_sequence
    if left <= 0:
        return _OVERLOADED
    num_running = rate * output * step.c0 / left
    if num_running > limits.max_num_running or num_running * context > limits.num_kv_tokens:
        return _OVERLOADED
    step_s = step.c0 + per_sequence * max(num_running, 1.0)

    # A prompt takes its part of the token budget of a step: short ones share one.
    service_s = prefill_s + step_s * uncached / limits.max_num_batched_tokens
    utilization = rate * service_s
    if utilization >= 1:
        return _OVERLOADED
    wait_s = kingman_wait_s(utilization, service_s, workload.arrival_scv, workload.service_scv)
    high = workload.num_uncached_tokens_high
    own_s = ceil(max(high, 1) / limits.max_num_batched_tokens) * step_s
    own_s += _compute_s(step, prompt + high - uncached, high)
    return Prediction(
        ttft_s=wait_quantile_s(utilization, wait_s, quantile) + step_s + own_s,  # it comes in the midst of a step
        tpot_s=step_s / (1 - prefill_share),
        num_running=num_running,
        utilization=utilization,
    )


def kingman_wait_s(utilization: float, service_s: float, arrival_scv: float, service_scv: float) -> float:
    """The mean wait in front of a single server, in heavy traffic."""
    return utilization / (1 - utilization) * (arrival_scv + service_scv) / 2 * service_s


def wait_quantile_s(utilization: float, mean_wait_s: float, quantile: float) -> float:
    """What the share `quantile` of the waits does not exceed; exact for M/M/1."""
    if utilization <= 1 - quantile or mean_wait_s <= 0:
        return 0.0
    return mean_wait_s / utilization * log(utilization / (1 - quantile))


def replicas_needed(is_enough: Callable[[int], bool], most: int) -> int:
    """The fewest replicas, at most `most`, for which `is_enough` says so; it says so for all larger numbers, too."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _compute_s(step: StepCoefficients, num_prompt_tokens: float, num_uncached_tokens: float) -> float:
    attention = num_uncached_tokens * (num_prompt_tokens - num_uncached_tokens / 2)
    return step.a * num_uncached_tokens + step.q * attention
