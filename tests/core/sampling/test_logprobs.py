"""Log-probabilities and ranks: values, order at ties, raw and processed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_core.sampling.logprobs import gather_logprobs
from sagellm_core.sampling.metadata import SamplingRow
from sagellm_protocol import SamplingParams
from sampling_reference import order_of, sample


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([3, 500, 3000]), st.booleans(), st.integers(1, 4))
def test_against_log_softmax_and_a_full_sort(seed, vocab_size, ties, num_rows):
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (num_rows, vocab_size)).astype(np.float32)
    logits = np.round(logits) if ties else logits
    tokens = generator.integers(0, vocab_size, num_rows).tolist()
    counts = generator.integers(0, 6, num_rows).tolist()
    found = gather_logprobs(torch.from_numpy(logits), tokens, counts)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    for i, entry in enumerate(found):
        order = order_of(logits[i]).tolist()
        assert (entry.token_id, entry.rank) == (tokens[i], order.index(tokens[i]) + 1)
        assert entry.logprob == pytest.approx(expected[i, tokens[i]], abs=1e-5)
        assert [candidate.token_id for candidate in entry.top] == order[: counts[i]]
        assert [candidate.rank for candidate in entry.top] == list(range(1, len(entry.top) + 1))
        np.testing.assert_allclose([c.logprob for c in entry.top], expected[i, order[: counts[i]]], atol=1e-5)


def test_rows_that_did_not_ask_get_none():
    rows = [SamplingRow(SamplingParams(logprobs=n), 0, 0) for n in (None, 0, 2)]
    found = sample(np.float32([[0, 1, 2]] * 3), rows).logprobs
    assert found[0] is None
    assert [len(entry.top) for entry in found[1:]] == [0, 2]


@pytest.mark.parametrize("in_company", [False, True])
@pytest.mark.parametrize("processed", [False, True])
def test_raw_unless_asked_otherwise_and_never_with_temperature(processed, in_company):
    params = SamplingParams(temperature=0.2, logit_bias={0: 2.0}, logprobs=1)
    rows = [SamplingRow(params, 0, 0, processed_logprobs=processed)]
    rows += [SamplingRow(SamplingParams(logit_bias={1: 1.0}), 0, 0)] if in_company else []
    logits = np.float32([[0, 1, 0.5]] * len(rows))
    entry = sample(logits, rows).logprobs[0]
    shown = logits[0] + np.float32([2 * processed, 0, 0])
    expected = shown - np.log(np.exp(shown).sum())
    assert entry.top[0].token_id == (0 if processed else 1)
    assert entry.top[0].logprob == pytest.approx(expected.max(), abs=1e-6)
    assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-6)


def test_impossible_tokens_are_not_among_the_best():
    row = SamplingRow(SamplingParams(logprobs=5), 0, 0, allowed_token_ids=[1, 3], processed_logprobs=True)
    (entry,) = sample(np.zeros((1, 8), np.float32), [row]).logprobs
    assert [candidate.token_id for candidate in entry.top] == [1, 3]


def test_no_rows_no_logprobs():
    assert gather_logprobs(torch.empty(0, 8), [], []) == []
