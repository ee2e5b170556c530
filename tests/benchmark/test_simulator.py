"""The simulator: engines that behave as their formula says, and a control plane that loses nothing on them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_benchmark.simulator import (
    EngineSpec,
    SimulationConfig,
    SimulationResult,
    SyntheticLoad,
    as_json,
    simulate,
    summarize,
)
from sagellm_benchmark.simulator.engine import Run, SimulatedEngine
from sagellm_benchmark.simulator.simulation import Simulation
from sagellm_benchmark.traces import TraceRequest
from sagellm_control_plane.fleet import Booking
from sagellm_control_plane.policies import POLICIES
from sagellm_control_plane.routing import ROUTERS, RoutingPolicy
from sagellm_control_plane.routing.marginal_cost import MarginalCost
from sagellm_control_plane.step_time import StepCoefficients
from sagellm_protocol import SLO, InvalidArgumentError

TIMES = StepCoefficients(c0=5e-3, a=50e-6, q=1e-9, k=2e-8, b=40e-6)
SPEC = EngineSpec(TIMES, num_blocks=64, block_size=16, max_num_batched_tokens=256, max_num_seqs=8)


def run_of(number: int, prompt: int, output: int, hashes: tuple[bytes, ...] = ()) -> Run:
    return Run(number, prompt, output, hashes, Booking(prompt))


def drive(engine: SimulatedEngine, arrivals: list[tuple[float, Run]], peeks: list[float] | None = None) -> None:
    """Run all; at the times of `peeks` somebody looks at the engine."""
    events = sorted([(at, 1, run) for at, run in arrivals] + [(at, 0, None) for at in peeks or []], key=lambda e: e[:2])
    for at, _, run in events:
        while engine.next_event <= at:
            engine.finish_step()
        if run is None:
            engine.catch_up(at)
        else:
            engine.submit(run, at)
    while engine.next_event < float("inf"):
        engine.finish_step()


# ---- one engine ---------------------------------------------------------------------------------------


def test_a_lone_request_takes_what_the_formula_says() -> None:
    engine, run = SimulatedEngine(0, SPEC), run_of(0, 600, 50)
    drive(engine, [(2.0, run)])
    chunks = [(0, 256), (256, 256), (512, 88)]
    assert run.first_token_at - 2.0 == pytest.approx(sum(TIMES.step_s(p, p * (c + p / 2), 0, 0) for c, p in chunks))
    decode_s = sum(TIMES.decode_s(601 + step, 1) for step in range(49))
    assert run.ended_at - run.first_token_at == pytest.approx(decode_s)
    assert engine.busy_s == pytest.approx(run.ended_at - 2.0)


def step_by_step(arrivals: list[tuple[float, Run]]) -> None:
    """The same engine, each step by itself and all sums made anew."""
    now, waiting = 0.0, sorted(arrivals, key=lambda arrival: arrival[0])
    prefilling: list[list[int]] = []  # index, tokens left
    decoding: dict[int, int] = {}  # index: tokens made
    queue: list[int] = []
    runs = [run for _, run in waiting]
    arrived = 0
    while arrived < len(waiting) or queue or prefilling or decoding:
        if not (queue or prefilling or decoding):
            now = max(now, waiting[arrived][0])
        while arrived < len(waiting) and waiting[arrived][0] <= now:
            queue.append(arrived)
            arrived += 1
        while queue and len(prefilling) + len(decoding) < SPEC.max_num_seqs:
            if sum(left for _, left in prefilling) >= SPEC.max_num_batched_tokens:
                break
            index = queue.pop(0)
            prefilling.append([index, runs[index].num_prompt_tokens])
        budget, chunks, attention = SPEC.max_num_batched_tokens - len(decoding), [], 0.0
        for entry in prefilling:
            chunk = min(budget, entry[1])
            if chunk > 0:
                context = runs[entry[0]].num_prompt_tokens - entry[1]
                attention += chunk * (context + chunk / 2)
                chunks.append((entry, chunk))
                budget -= chunk
        kv_tokens = sum(runs[index].num_prompt_tokens + made for index, made in decoding.items())
        now += TIMES.step_s(sum(chunk for _, chunk in chunks), attention, kv_tokens, len(decoding))
        for index in list(decoding):
            decoding[index] += 1
        for entry, chunk in chunks:
            entry[1] -= chunk
            if not entry[1]:
                prefilling.remove(entry)
                runs[entry[0]].first_token_at = now
                decoding[entry[0]] = 1
        for index, made in list(decoding.items()):
            if made == runs[index].num_output_tokens:
                runs[index].ended_at = now
                del decoding[index]


REQUESTS = st.lists(
    st.tuples(st.floats(0, 3), st.integers(1, 700), st.integers(1, 60)),
    min_size=1,
    max_size=14,
    unique_by=lambda r: r[0],
)


@given(REQUESTS, st.lists(st.floats(0, 5), max_size=10))
@settings(max_examples=150, deadline=None)
def test_rows_of_decoding_steps_are_the_steps_one_by_one(
    requests: list[tuple[float, int, int]], peeks: list[float]
) -> None:
    spec = EngineSpec(TIMES, num_blocks=10_000, block_size=16, max_num_batched_tokens=256, max_num_seqs=8)
    fast = [(at, run_of(number, prompt, output)) for number, (at, prompt, output) in enumerate(requests)]
    slow = [(at, run_of(number, prompt, output)) for number, (at, prompt, output) in enumerate(requests)]
    drive(SimulatedEngine(0, spec), fast, peeks)
    step_by_step(slow)
    for (_, one), (_, other) in zip(fast, slow, strict=True):
        assert one.first_token_at == pytest.approx(other.first_token_at, rel=1e-9)
        assert one.ended_at == pytest.approx(other.ended_at, rel=1e-9)


def test_a_prompt_is_found_again_until_its_space_is_needed() -> None:
    engine = SimulatedEngine(0, SPEC)
    names = tuple(bytes([number]) * 32 for number in range(20))
    first, again, other = run_of(0, 320, 4, names), run_of(1, 320, 4, names), run_of(2, 900, 4)
    last = run_of(3, 320, 4, names)
    drive(engine, [(0.0, first), (1.0, again), (2.0, other), (3.0, last)])
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 319)
    # 57 of 64 blocks went to the other: the prompt's first 7 outlived it.
    assert last.num_cached_tokens == 7 * 16
    assert again.first_token_at - 1.0 < (first.first_token_at - 0.0) / 2


# ---- the whole ----------------------------------------------------------------------------------------

LOAD = SyntheticLoad(num_requests=150, requests_per_s=12, system_tokens=2048, question_tokens=600, answer_tokens=60)


def run_small(router: str = "marginal_cost", policy: str = "fifo", **fields: object) -> SimulationResult:
    spec = EngineSpec(num_blocks=512, max_num_batched_tokens=4096, max_num_seqs=6)
    values = {"num_engines": 3, "engine": spec, **fields}
    return simulate(LOAD.requests(), SimulationConfig(router=router, policy=policy, **values))  # type: ignore[arg-type]


@pytest.mark.parametrize("router", sorted(ROUTERS))
@pytest.mark.parametrize("policy", ["fifo", "slo_aware"])
def test_every_request_is_answered_once_and_the_books_close(router: str, policy: str) -> None:
    spec = EngineSpec(num_blocks=512, max_num_batched_tokens=4096, max_num_seqs=6)
    simulation = Simulation(
        LOAD.requests(), SimulationConfig(3, router=router, policy=policy, engine=spec, slo=SLO(ttft_ms=800))
    )
    result = simulation.run()
    assert len(result.outcomes) == 150
    assert all(0 < outcome.ttft_s <= outcome.e2e_s for outcome in result.outcomes)
    assert all(0 <= outcome.num_cached_tokens < outcome.num_prompt_tokens for outcome in result.outcomes)
    fleet = simulation.fleet
    for name in ("num_requests", "num_queued", "queued_tokens", "queued_attention", "num_decoding", "kv_tokens"):
        assert not getattr(fleet, name).any(), name
    for engine in simulation.engines.values():
        assert simulation.index.num_blocks(engine.row) == engine.cache.num_cached
        assert engine.cache.num_used == 0


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_runs(policy: str) -> None:
    assert len(run_small(policy=policy).outcomes) == 150


def test_the_same_run_gives_the_same_result() -> None:
    assert run_small("random") == run_small("random")
    assert run_small("random") != run_small("random", seed=1)


def test_where_prompts_share_much_the_default_beats_round_robin_by_far() -> None:
    load = SyntheticLoad(num_requests=400, requests_per_s=40, num_systems=9, system_tokens=8192, question_tokens=400)
    means = {}
    for router in ("round_robin", "marginal_cost"):
        config = SimulationConfig(3, router=router, engine=EngineSpec(num_blocks=128, max_num_seqs=64))
        means[router] = float(np.mean([outcome.ttft_s for outcome in simulate(load.requests(), config).outcomes]))
    assert means["marginal_cost"] < means["round_robin"] / 2


def test_in_overload_requests_that_wait_for_their_prefixes_save_everybody_time(monkeypatch: pytest.MonkeyPatch) -> None:
    load = SyntheticLoad(num_requests=600, requests_per_s=24)
    config = SimulationConfig(4, engine=EngineSpec(max_num_seqs=8))
    window = simulate(load.requests(), config)
    monkeypatch.setattr(MarginalCost, "would_wait", RoutingPolicy.would_wait)
    without = simulate(load.requests(), config)
    means = [float(np.mean([outcome.ttft_s for outcome in result.outcomes])) for result in (window, without)]
    assert means[0] < means[1] / 2
    assert window.duration_s < without.duration_s


def test_step_times_are_learned_from_reports() -> None:
    predicted = summarize(run_small(), SimulationConfig())
    assert predicted.ttft_error is not None
    assert predicted.ttft_error < 0.2


def test_late_reports_cost_hits_but_no_request() -> None:
    prompt, late = run_small(report_delay_s=0.0), run_small(report_delay_s=20.0)
    assert sum(o.num_expected_cached_tokens for o in late.outcomes) < sum(
        o.num_expected_cached_tokens for o in prompt.outcomes
    )


def test_figures_are_those_of_the_outcomes() -> None:
    result = run_small()
    report = summarize(result, SimulationConfig(), ttft_s=0.5, tpot_s=0.05)
    good = [outcome.ttft_s <= 0.5 and outcome.tpot_s <= 0.05 for outcome in result.outcomes]
    assert report.goodput == sum(good) / 150
    assert report.ttft_ms["mean"] == pytest.approx(1e3 * np.mean([outcome.ttft_s for outcome in result.outcomes]))
    told = as_json(SimulationConfig(slo=SLO(ttft_ms=5)), [report], "x")
    assert told["config"]["slo"] == {"ttft_ms": 5.0}  # type: ignore[index]


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="needs 7 blocks, an engine has 3"):
        simulate([TraceRequest(0.0, 3200, 10)], SimulationConfig(engine=EngineSpec(num_blocks=3)))
    with pytest.raises(InvalidArgumentError, match="no times of arrival"):
        simulate([TraceRequest(None, 32, 10)], SimulationConfig())


def test_made_up_conversations_repeat_what_was_said() -> None:
    requests = SyntheticLoad(num_requests=2000, requests_per_s=5, seed=3).requests()
    assert requests == SyntheticLoad(num_requests=2000, requests_per_s=5, seed=3).requests()
    times = [request.at_s or 0.0 for request in requests]
    assert times == sorted(times)
    assert 2000 / times[-1] == pytest.approx(5, rel=0.25)
    seen: set[int] = set()
    known = 0
    for request in requests:
        assert request.input_len - (len(request.block_ids) - 1) * request.block_tokens >= 0
        assert request.input_len <= len(request.block_ids) * request.block_tokens
        known += sum(block in seen for block in request.block_ids)
        seen.update(request.block_ids)
    assert known / sum(len(request.block_ids) for request in requests) > 0.6
