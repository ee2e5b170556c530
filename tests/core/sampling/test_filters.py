"""Top-k, top-p and min-p: counts against the naive filters, and those against transformers' warpers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_backend.reference.filters import num_kept
from sagellm_protocol import SamplingParams
from sampling_reference import kept_tokens, order_of

FILTERS = st.builds(
    dict,
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 4, 30]),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 1.0),
)


@settings(deadline=None, max_examples=200)
@given(FILTERS, st.integers(0, 10**6), st.integers(1, 60))
def test_counts_against_the_naive_filters(filters, seed, vocab_size):
    logits = np.random.default_rng(seed).normal(0, 2, vocab_size)
    params = SamplingParams(strategy="sampling", **filters)
    falling = logits[order_of(logits)] / params.temperature
    weights = torch.from_numpy(np.exp(falling - falling[0]))[None]
    cumulative = weights.cumsum(-1)
    after_top_k = torch.tensor([min(params.top_k or vocab_size, vocab_size)])
    total = cumulative.gather(1, after_top_k[:, None] - 1)[:, 0]
    top_p, min_p = (torch.tensor([value], dtype=torch.float64) for value in (params.top_p, params.min_p))
    kept = num_kept(weights, cumulative, after_top_k, total, top_p, min_p)
    assert kept.item() == len(kept_tokens(logits.copy(), params))


def test_the_naive_filters_against_transformers():
    warpers = pytest.importorskip("transformers.generation.logits_process")
    generator = np.random.default_rng(0)
    for _ in range(200):
        vocab_size = int(generator.integers(2, 60))
        logits = generator.normal(0, 2, vocab_size)
        filters = {
            "temperature": float(generator.choice([0.5, 1.0, 2.0])),
            "top_k": int(generator.choice([0, 1, 4, 30])),
            "top_p": float(generator.choice([0.1, 0.6, 0.95, 1.0])),
            "min_p": float(generator.choice([0.0, 0.02, 0.3, 1.0])),
        }
        scores = warpers.TemperatureLogitsWarper(filters["temperature"])(None, torch.from_numpy(logits)[None])
        if filters["top_k"]:
            scores = warpers.TopKLogitsWarper(filters["top_k"])(None, scores)
        if filters["top_p"] < 1:
            scores = warpers.TopPLogitsWarper(filters["top_p"])(None, scores)
        scores = warpers.MinPLogitsWarper(filters["min_p"])(None, scores)
        expected = set(torch.nonzero(scores[0] > -torch.inf)[:, 0].tolist())
        assert kept_tokens(logits, SamplingParams(strategy="sampling", **filters)) == expected
