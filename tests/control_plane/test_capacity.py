"""The formulas of capacity against an engine that is simulated step by step."""

from __future__ import annotations

import random
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_control_plane.capacity import (
    Limits,
    Objectives,
    Workload,
    kingman_wait_s,
    predict,
    replicas_needed,
    wait_quantile_s,
)
from sagellm_control_plane.step_time import StepCoefficients

STEP = StepCoefficients(c0=8e-3, a=60e-6, q=3e-9, k=15e-9, b=60e-6)
LIMITS = Limits(max_num_running=256, max_num_batched_tokens=2048)
NORMAL = Workload(1500, 1500, 200, 1500)


def simulate(rate: float, workload: Workload, *, num_requests: int = 2500, seed: int = 1) -> tuple[float, float]:
    """p90 of the times to first token and the mean time per token of an engine with continuous batching."""
    rng = random.Random(seed)
    arrivals, now = [], 0.0
    for _ in range(num_requests):
        now += rng.expovariate(rate)
        arrivals.append(now)
    prompt, output = int(workload.num_prompt_tokens), int(workload.num_output_tokens)
    now, next_arrival = 0.0, 0
    queue: list[list[float]] = []  # [arrival, tokens left]
    running: list[list[float]] = []  # [first token at, tokens made]
    ttfts, tpots = [], []
    while next_arrival < num_requests or queue or running:
        if not queue and not running:
            now = max(now, arrivals[next_arrival])
        while next_arrival < num_requests and arrivals[next_arrival] <= now:
            queue.append([arrivals[next_arrival], prompt])
            next_arrival += 1
        budget, tokens, attention, done = 2048.0, 0.0, 0.0, []
        while queue and budget > 0:
            entry = queue[0]
            part = min(budget, entry[1])
            attention += part * (prompt - entry[1] + part / 2)
            tokens, budget = tokens + part, budget - part
            entry[1] -= part
            if entry[1] > 0:
                break
            done.append(queue.pop(0))
        context = sum(prompt + made for _, made in running)
        now += STEP.step_s(tokens, attention, context, len(running))
        for sequence in running:
            sequence[1] += 1
        tpots += [(now - first) / (output - 1) for first, made in running if made >= output]
        running = [sequence for sequence in running if sequence[1] < output]
        ttfts += [now - entry[0] for entry in done]
        running += [[now, 1] for _ in done]
    ttfts.sort()
    return ttfts[int(0.9 * len(ttfts))], sum(tpots) / len(tpots)


@pytest.mark.parametrize("rate", [0.5, 2.0, 4.0, 5.5])
def test_predictions_meet_the_simulated_engine(rate: float) -> None:
    ttft_s, tpot_s = simulate(rate, NORMAL)
    workload = Workload(1500, 1500, 200, 1500, arrival_scv=1, service_scv=0)
    expected = predict(rate, workload, STEP, LIMITS, quantile=0.9)
    assert expected.tpot_s == pytest.approx(tpot_s, rel=0.15)
    assert 0.7 * ttft_s < expected.ttft_s < 1.6 * ttft_s, "rather too long than too short"


def test_where_it_cannot_keep_up_times_are_infinite() -> None:
    assert predict(9.5, NORMAL, STEP, LIMITS).ttft_s == inf
    few = Limits(max_num_running=4)
    assert predict(4, NORMAL, STEP, few).ttft_s == inf
    assert predict(4, NORMAL, STEP, Limits(256, 2048, num_kv_tokens=5_000)).ttft_s == inf
    assert predict(0.1, NORMAL, STEP, few).ttft_s < 0.5


def test_known_waits() -> None:
    assert kingman_wait_s(0.8, 0.1, 1, 1) == pytest.approx(0.4), "M/M/1: ρ/(1-ρ)·s"
    assert kingman_wait_s(0.8, 0.1, 1, 0) == pytest.approx(0.2), "M/D/1 waits half as long"
    assert wait_quantile_s(0.8, 0.4, 0.9) == pytest.approx(0.5 * 2.0794, rel=1e-3), "ln(8)·s/(1-ρ)"
    assert wait_quantile_s(0.05, 0.4, 0.9) == 0.0, "95 % do not wait at all"


@given(
    st.floats(0.01, 20),
    st.floats(0.01, 20),
    st.integers(1, 8000),
    st.floats(0, 0.99),
    st.integers(1, 1000),
    st.floats(0, 10),
)
def test_more_load_is_never_faster(
    rate: float, more: float, prompt: int, cached: float, output: int, scv: float
) -> None:
    uncached = max(1.0, prompt * (1 - cached))
    workload = Workload(prompt, uncached, output, uncached, arrival_scv=scv)
    less, high = predict(rate, workload, STEP, LIMITS), predict(rate + more, workload, STEP, LIMITS)
    assert 0 < less.ttft_s <= high.ttft_s
    assert 0 < less.tpot_s <= high.tpot_s


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_fewest_replicas(enough: int, most: int) -> None:
    assert replicas_needed(lambda count: count >= enough, most) == min(enough, most)


def test_replicas_follow_the_load_and_the_queue_term_counts() -> None:
    def needed(rate: float, objectives: Objectives, scv: float = 1.0) -> int:
        workload = Workload(1500, 1500, 200, 1500, arrival_scv=scv)
        return replicas_needed(lambda n: predict(rate / n, workload, STEP, LIMITS).meets(objectives), 100)

    objectives = Objectives(ttft_s=0.6, tpot_s=0.05)
    by_rate = [needed(rate, objectives) for rate in (1, 5, 10, 20, 40, 80)]
    assert by_rate == sorted(by_rate)
    assert by_rate[-1] >= 12
    assert needed(40, Objectives(0.25, 0.05)) > needed(40, objectives)
    assert needed(40, objectives, scv=6) > needed(40, objectives), "bursts need more"
