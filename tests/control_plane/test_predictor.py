"""What is expected of requests: first tokens, lengths, waits."""

from __future__ import annotations

import numpy as np
import pytest

from sagellm_control_plane.fleet import Booking, Fleet
from sagellm_control_plane.predictor import OutputLengths, Predictor
from sagellm_control_plane.step_time import StepCoefficients
from sagellm_core.engine_core.report import StepSample

ENGINE = StepCoefficients(c0=10e-3, a=1e-4, q=1e-8, k=1e-7, b=1e-4)


def predictor(num_engines: int = 1) -> tuple[Predictor, Fleet, np.ndarray]:
    fleet = Fleet()
    made = Predictor(fleet)
    rows = [fleet.add(str(number), max_num_batched_tokens=1000) for number in range(num_engines)]
    for row in rows:
        made.add_engine(row, ENGINE)
    return made, fleet, np.array(rows)


def test_a_first_token_waits_for_the_prefills_ahead_of_it() -> None:
    made, fleet, rows = predictor()
    idle = made.ttft_s(rows, 1000)[0]
    assert idle == pytest.approx(ENGINE.prefill_s(1000, tokens_per_step=1000)) == made.prefill_s(1000)
    assert made.ttft_s(rows, 1000, 900)[0] < idle / 2
    fleet.grant(rows[0], Booking(3000))
    assert made.ttft_s(rows, 1000)[0] == pytest.approx(idle + 3 * ENGINE.c0 + ENGINE.a * 3000 + ENGINE.q * 3000**2 / 2)


def test_tokens_come_slower_beside_others() -> None:
    made, fleet, rows = predictor()
    alone = made.tpot_s(rows, 500)[0]
    assert alone == pytest.approx(ENGINE.decode_s(500, 1))
    booking = Booking(2000)
    fleet.grant(rows[0], booking)
    fleet.advance(booking, 1)
    assert made.tpot_s(rows, 500)[0] == pytest.approx(ENGINE.decode_s(2501, 2))


def test_steps_teach_the_fleet() -> None:
    made, fleet, rows = predictor(2)
    truth = StepCoefficients(*(10 * value for value in (ENGINE.c0, ENGINE.a, ENGINE.q, ENGINE.k, ENGINE.b)))
    steps = [
        StepSample(prefill, prefill**2 / 2, kv, 4, truth.step_s(prefill, prefill**2 / 2, kv, 4))
        for prefill, kv in zip(range(0, 1000, 10), range(0, 10_000, 100), strict=True)
    ]
    made.observe_steps(int(rows[1]), steps)
    assert fleet.a[rows[1]] == pytest.approx(truth.a, rel=0.1)
    assert fleet.a[rows[0]] == ENGINE.a
    made.remove_engine(int(rows[1]))
    made.observe_steps(int(rows[1]), steps)  # a late report of an engine that is gone


def test_lengths_are_of_the_tenant_or_of_the_model() -> None:
    made, _, _ = predictor()
    assert made.output_tokens("t", "m", 256) == 256
    for _ in range(50):
        made.observe_answer("other", "m", 100, 1.0)
    assert made.output_tokens("t", "m", 256) == pytest.approx(100, rel=0.1)
    for _ in range(10):
        made.observe_answer("t", "m", 10, 1.0)
    assert made.output_tokens("t", "m", 256) == pytest.approx(100, rel=0.1)  # too few to go by
    for _ in range(20):
        made.observe_answer("t", "m", 10, 1.0)
    assert made.output_tokens("t", "m", 256) == pytest.approx(10, rel=0.15)
    assert made.output_tokens("t", "m", 5) == 5
    assert made.output_tokens("t", "unknown", 77) == 77


def test_quantiles_are_those_of_the_answers() -> None:
    lengths = OutputLengths()
    assert lengths.quantile(0.5) is None
    for number in range(100):
        lengths.add(20 if number % 2 else 500)
    assert lengths.quantile(0.25) == pytest.approx(20, rel=0.1)
    assert lengths.quantile(0.75) == pytest.approx(500, rel=0.1)


def test_a_wait_is_that_of_the_places_which_become_free() -> None:
    made, _, _ = predictor()
    for _ in range(200):
        made.observe_answer("", "m", 50, 4.0)
    assert made.queue_wait_s("m", 0, 8, 100, 50) == pytest.approx(0.5)
    assert made.queue_wait_s("m", 15, 8, 100, 50) == pytest.approx(8.0)
    assert made.queue_wait_s("new", 0, 1, 1000, 100) == pytest.approx(made.prefill_s(1000) + made.decode_s(100))
    assert made.queue_wait_s("m", 0, 0, 100, 50) == float("inf")


def test_what_is_learned_is_bounded() -> None:
    made, _, _ = predictor()
    for number in range(5000):
        made.observe_answer(f"tenant-{number}", f"model-{number}", 10, 1.0)
    assert len(made._lengths) <= 4096
    assert len(made._service_s) <= 4096


def test_without_engines_nothing_takes_time() -> None:
    made = Predictor(Fleet())
    assert made.prefill_s(100) == made.decode_s(100) == 0.0
