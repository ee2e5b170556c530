"""Inverse CDF, argmax and top candidates: exactness at ties, ends and block borders."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_backend.reference.distribution import argmax_rows, invert_sorted, softmax_weights, ties_at, top_candidates
from sampling_reference import order_of


def random_logits(seed, num_rows, vocab_size, levels=None):
    """Normal logits; with `levels` only so many different values, so that ties abound."""
    logits = np.random.default_rng(seed).normal(0, 2, (num_rows, vocab_size)).astype(np.float32)
    return logits if levels is None else np.round(logits * levels / 4).astype(np.float32)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 63, 64, 1000, 1024, 2050]), st.sampled_from([None, 2]))
def test_argmax_takes_the_lowest_id_among_equals(seed, vocab_size, levels):
    logits = random_logits(seed, 3, vocab_size, levels)
    assert argmax_rows(torch.from_numpy(logits)).tolist() == [order_of(row)[0] for row in logits]


@settings(deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([5, 64, 700, 2050, 6000]),
    st.sampled_from([None, 40]),
    st.sampled_from([1, 3, 5, 20]),
)
def test_top_candidates_are_the_first_of_the_sorted_row(seed, vocab_size, levels, k):
    logits = random_logits(seed, 3, vocab_size, levels)
    k = min(k, vocab_size)
    values, ids = top_candidates(torch.from_numpy(logits), min(k + 1, vocab_size))
    tied = ties_at(values, torch.full((3,), k))
    for i, row in enumerate(logits):
        order = order_of(row)
        np.testing.assert_array_equal(values[i, :k], row[order[:k]])
        assert bool(tied[i]) == (k < vocab_size and row[order[k - 1]] == row[order[k]])
        if not tied[i]:
            assert ids[i, :k].tolist() == order[:k].tolist()


def test_tokens_without_probability_are_not_tied():
    values = torch.tensor([[1.0, -torch.inf, -torch.inf]])
    assert not ties_at(values, torch.tensor([2])).any()


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 7, 1023, 1024, 1025, 5000]), st.sampled_from([None, 0.3, 2.0]))
def test_log_normalizer_and_total(seed, vocab_size, temperature):
    logits = random_logits(seed, 2, vocab_size)
    weights = softmax_weights(torch.from_numpy(logits), None if temperature is None else torch.full((2,), temperature))
    scaled = logits.astype(np.float64) / (temperature or 1.0)
    peaks = scaled.max(-1, keepdims=True)
    np.testing.assert_allclose(weights.total, np.exp(scaled - peaks).sum(-1), rtol=1e-5)
    if temperature is None:
        np.testing.assert_allclose(
            weights.log_normalizer, (peaks + np.log(np.exp(scaled - peaks).sum(-1, keepdims=True)))[:, 0], atol=1e-5
        )


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 7, 1024, 1025, 5000]), st.floats(1e-9, 1 - 1e-9))
def test_inversion_finds_the_interval_of_the_uniform(seed, vocab_size, uniform):
    logits = random_logits(seed, 1, vocab_size)
    weights = np.exp(logits[0].astype(np.float64) - logits.max())
    cumulative = np.cumsum(weights) / weights.sum()
    token = int(softmax_weights(torch.from_numpy(logits)).invert(torch.tensor([uniform], dtype=torch.float64)))
    assert (cumulative[token - 1] if token else 0.0) - 1e-6 <= uniform <= cumulative[token] + 1e-6


@pytest.mark.parametrize("uniform", [2.0**-53, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("alive", [0, 1023, 1024, 2999])
def test_a_token_without_weight_is_never_drawn(uniform, alive):
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, alive] = 5.0
    assert softmax_weights(logits).invert(torch.tensor([uniform], dtype=torch.float64)).tolist() == [alive]


@pytest.mark.parametrize("uniform", [2.0**-53, 1 - 2.0**-53])
def test_sorted_inversion_stays_within_what_is_kept(uniform):
    cumulative = torch.tensor([[0.5, 0.75, 0.75, 1.0]], dtype=torch.float64)
    index = invert_sorted(cumulative, torch.tensor([3]), torch.tensor([uniform], dtype=torch.float64))
    assert index.item() == (0 if uniform < 0.5 else 1)


@pytest.mark.parametrize("row", [[-np.inf] * 4, [np.nan] * 4])
def test_a_row_without_a_distribution_gives_some_token(row):
    logits = torch.tensor([row, [0.0, 9.0, 0.0, 0.0]], dtype=torch.float32)
    tokens = softmax_weights(logits).invert(torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist()
    assert 0 <= tokens[0] < 1024
    assert tokens[1] == 1
