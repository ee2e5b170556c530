"""Philox against the published known answers; uniforms and derived seeds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_core.sampling.rng import derive_seed, philox4x32, uniforms

# counter, key, output: `philox4x32 10` in Random123's tests/kat_vectors.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = st.integers(0, 2**64 - 1)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def one_uniform(seed: int, position: int) -> float:
    return float(uniforms(np.array([seed], dtype=np.uint64), np.array([position]))[0])


def test_known_answers_all_at_once():
    counters = np.array([words(counter) for counter, _, _ in KNOWN_ANSWERS], dtype=np.uint32)
    keys = np.array([words(key) for _, key, _ in KNOWN_ANSWERS], dtype=np.uint32)
    expected = np.array([words(output) for _, _, output in KNOWN_ANSWERS], dtype=np.uint32)
    np.testing.assert_array_equal(philox4x32(counters, keys), expected)


@pytest.mark.parametrize("known", KNOWN_ANSWERS)
def test_known_answers_one_by_one(known):
    counter, key, output = (np.array([words(part)], dtype=np.uint32) for part in known)
    np.testing.assert_array_equal(philox4x32(counter, key), output)


@given(st.lists(st.tuples(SEEDS, st.integers(0, 2**40)), min_size=1, max_size=8))
def test_a_number_depends_on_its_seed_and_position_alone(pairs):
    together = uniforms(np.array([s for s, _ in pairs], dtype=np.uint64), np.array([p for _, p in pairs]))
    assert together.tolist() == [one_uniform(seed, position) for seed, position in pairs]


def test_the_numbers_of_a_seed_stay_as_they_are():
    # A change here changes the answer of every seeded request: users keep seeds.
    assert [round(one_uniform(42, position), 12) for position in range(3)] == [
        0.468586518339,
        0.327063381203,
        0.658315527212,
    ]


def test_uniforms_are_uniform_and_uncorrelated():
    numbers = uniforms(np.full(20_000, 7, dtype=np.uint64), np.arange(20_000))
    assert numbers.min() > 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi-square, 19 degrees of freedom: p < 1e-5
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_neighbouring_seeds_are_independent():
    numbers = uniforms(np.arange(20_000, dtype=np.uint64), np.zeros(20_000, dtype=np.int64))
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_the_ends_are_never_reached(monkeypatch):
    # The words that would give the smallest and the largest number.
    for word, bound in ((0, 2.0**-53), (0xFFFFFFFF, 1 - 2.0**-53)):
        block = np.full((1, 4), word, dtype=np.uint32)
        monkeypatch.setattr("sagellm_core.sampling.rng.philox4x32", lambda counter, key, block=block: block)
        assert one_uniform(0, 0) == bound


@given(SEEDS)
def test_derived_seeds_differ_and_the_first_output_keeps_its_own(seed):
    derived = [derive_seed(seed, index) for index in range(16)]
    assert derived[0] == seed
    assert len(set(derived)) == 16
    assert all(0 <= value < 2**64 for value in derived)
