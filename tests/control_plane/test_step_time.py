"""Step times: planted coefficients are found, and nothing ever costs less than nothing."""

from __future__ import annotations

import random
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_control_plane.step_time import DEFAULT_PRIOR, StepCoefficients, StepTimeModel, nnls
from sagellm_core.engine_core.report import StepSample

CPU = StepCoefficients(c0=20e-3, a=2e-3, q=30e-9, k=4e-7, b=3e-3)  # slower than the prior by far


def sample(truth: StepCoefficients, rng: random.Random, *, noise: float = 0.0, prefill: bool = True) -> StepSample:
    num_decoding = rng.randint(0, 32)
    kv_tokens = sum(rng.randint(10, 3000) for _ in range(num_decoding))
    prefill_tokens = rng.choice([0, rng.randint(1, 2048)]) if prefill else 0
    attention = prefill_tokens * (rng.randint(0, 4000) + prefill_tokens / 2)
    duration_s = truth.step_s(prefill_tokens, attention, kv_tokens, num_decoding) * rng.uniform(1 - noise, 1 + noise)
    return StepSample(prefill_tokens, attention, kv_tokens, num_decoding, duration_s)


def fitted(truth: StepCoefficients, num: int, *, noise: float = 0.0, prefill: bool = True) -> StepTimeModel:
    rng, model = random.Random(0), StepTimeModel()
    for _ in range(num):
        model.observe(sample(truth, rng, noise=noise, prefill=prefill))
    return model


@pytest.mark.parametrize(
    "truth",
    [CPU, DEFAULT_PRIOR, StepCoefficients(1e-3, 1e-5, 1e-10, 1e-9, 1e-6), StepCoefficients(5e-3, 1e-4, 0.0, 1e-7, 0.0)],
)
def test_planted_coefficients_are_found(truth: StepCoefficients) -> None:
    found = fitted(truth, 3000, noise=0.1).coefficients
    rng = random.Random(7)
    errors = []
    for _ in range(300):
        step = sample(truth, rng)
        predicted = found.step_s(step.prefill_tokens, step.prefill_attention, step.kv_tokens, step.num_decoding)
        errors.append(abs(predicted / step.duration_s - 1))
    assert np.median(errors) < 0.02
    assert max(errors) < 0.15
    assert found.a == pytest.approx(truth.a, rel=0.1)


def test_without_noise_they_are_found_closely() -> None:
    found = fitted(CPU, 3000).coefficients
    for name in ("c0", "a", "q", "k", "b"):
        assert getattr(found, name) == pytest.approx(getattr(CPU, name), rel=0.03), name


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            StepSample,
            prefill_tokens=st.integers(0, 8192),
            prefill_attention=st.floats(0, 1e8),
            kv_tokens=st.integers(0, 10**6),
            num_decoding=st.integers(0, 256),
            duration_s=st.floats(0, 10),
        ),
        max_size=60,
    )
)
def test_coefficients_are_never_negative_or_infinite(steps: list[StepSample]) -> None:
    model = StepTimeModel()
    for step in steps:
        model.observe(step)
    values = np.array(astuple(model.coefficients))
    assert np.isfinite(values).all()
    assert (values >= 0).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 12))
def test_nnls_meets_the_conditions_of_a_minimum(seed: int, num_columns: int, num_rows: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(num_rows, num_columns)), rng.normal(size=num_rows)
    x = nnls(matrix, target)
    gradient = matrix.T @ (matrix @ x - target)
    assert (x >= 0).all()
    assert (gradient >= -1e-8).all()  # no variable at 0 wants to grow
    assert abs(gradient[x > 0]).max(initial=0) < 1e-8  # and none above it to move


def test_the_prior_speaks_until_there_are_samples() -> None:
    model, rng = StepTimeModel(CPU), random.Random(0)
    for _ in range(4):
        model.observe(sample(DEFAULT_PRIOR, rng))
    assert model.coefficients == CPU
    model.observe(sample(DEFAULT_PRIOR, rng))
    assert model.coefficients != CPU


def test_what_was_never_seen_stays_in_proportion_to_what_was() -> None:
    slow = StepCoefficients(*(100 * value for value in astuple(DEFAULT_PRIOR)))
    found = fitted(slow, 500, prefill=False).coefficients
    assert found.a == pytest.approx(slow.a, rel=0.2)
    assert found.q == pytest.approx(slow.q, rel=0.2)


def test_an_engine_that_became_slower_is_followed() -> None:
    model, rng = StepTimeModel(), random.Random(1)
    for factor in (1, 3):
        truth = StepCoefficients(*(factor * value for value in astuple(CPU)))
        for _ in range(5000):
            model.observe(sample(truth, rng))
    assert model.coefficients.a == pytest.approx(3 * CPU.a, rel=0.1)


def test_a_pause_of_the_machine_changes_little() -> None:
    model, rng = fitted(CPU, 2000), random.Random(2)
    before = model.coefficients
    for _ in range(40):
        step = sample(CPU, rng)
        pause_s = 5.0 if rng.random() < 0.02 else 0.0
        model.observe(
            StepSample(
                step.prefill_tokens,
                step.prefill_attention,
                step.kv_tokens,
                step.num_decoding,
                step.duration_s + pause_s,
            )
        )
    assert model.coefficients.step_s(0, 0, 20_000, 16) == pytest.approx(before.step_s(0, 0, 20_000, 16), rel=0.1)


def test_buckets_are_bounded() -> None:
    model = StepTimeModel()
    for number in range(5000):
        model.observe(
            StepSample(number * 7919 % 10**6, float(number**2), number * 104_729 % 10**7, number % 1000, 1e-3)
        )
    assert len(model._buckets) <= 256
