"""The sampler against a naive version, its independence of company, and the distributions it draws from."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_core.engine_core.types import EngineCoreRequest
from sagellm_core.sampling.metadata import SamplingMetadata, SamplingRow
from sagellm_core.sampling.sampler import Sampler
from sagellm_protocol import DecodingStrategy, SamplingParams
from sampling_reference import draw, kept_tokens, process, sample, softmax

# Below one block of sums, several of them, and enough blocks for the shortcut to the top candidates.
VOCAB_SIZES = [1, 5, 100, 1500, 4200]


def sampling(**params):
    return SamplingParams(strategy=DecodingStrategy.SAMPLING, **params)


@st.composite
def sampling_rows(draw_value, vocab_size):
    """Any parameters, weighted towards combinations that take different paths."""
    greedy = draw_value(st.integers(0, 4)) == 0
    ids = st.lists(st.integers(0, vocab_size - 1), max_size=5)
    params = SamplingParams(
        strategy=DecodingStrategy.GREEDY if greedy else DecodingStrategy.SAMPLING,
        temperature=draw_value(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_k=draw_value(st.sampled_from([0, 0, 1, 3, 50, 1030, 10**6])),
        top_p=draw_value(st.sampled_from([1.0, 1.0, 0.2, 0.9, 0.999])),
        min_p=draw_value(st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0])),
        repetition_penalty=draw_value(st.sampled_from([1.0, 1.0, 1.2])),
        presence_penalty=draw_value(st.sampled_from([0.0, 0.0, 0.5])),
        logprobs=draw_value(st.sampled_from([None, 0, 3])),
    )
    return SamplingRow(
        params,
        seed=draw_value(st.integers(0, 2**64 - 1)),
        position=draw_value(st.integers(0, 5000)),
        prompt_token_ids=draw_value(ids),
        output_token_ids=draw_value(ids),
        processed_logprobs=draw_value(st.booleans()),
    )


@st.composite
def batches(draw_value, max_rows=5):
    vocab_size = draw_value(st.sampled_from(VOCAB_SIZES))
    rows = draw_value(st.lists(sampling_rows(vocab_size), min_size=1, max_size=max_rows))
    logits = np.random.default_rng(draw_value(st.integers(0, 10**6))).normal(0, 3, (len(rows), vocab_size))
    if draw_value(st.booleans()):
        logits = np.round(logits)  # many ties
    return logits.astype(np.float32), rows


@settings(deadline=None, max_examples=150)
@given(batches())
def test_against_a_naive_sampler(batch):
    logits, rows = batch
    tokens = sample(logits, rows).token_ids
    for i, row in enumerate(rows):
        expected, margin = draw(logits[i], row)
        assert tokens[i] == expected or margin < 1e-5


@settings(deadline=None, max_examples=100)
@given(batches())
def test_a_row_gets_the_same_bits_alone_and_in_any_batch(batch):
    logits, rows = batch
    together = sample(logits, rows)
    backwards = sample(logits[::-1], rows[::-1])
    for i, row in enumerate(rows):
        alone = sample(logits[i : i + 1], [row])
        assert alone.token_ids[0] == together.token_ids[i] == backwards.token_ids[-1 - i]
        assert alone.logprobs[0] == together.logprobs[i] == backwards.logprobs[-1 - i]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "min_p": 0.02},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 2000},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [32_000, 50_257])
def test_large_vocabulary_batch_and_threads_change_nothing(params, vocab_size):
    logits = np.random.default_rng(1).normal(0, 2, (9, vocab_size)).astype(np.float32)
    rows = [SamplingRow(sampling(**params, logprobs=2), seed=3, position=i) for i in range(9)]
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(sample(logits, rows))
    finally:
        torch.set_num_threads(before)
    alone = [sample(logits[i : i + 1], rows[i : i + 1]) for i in range(9)]
    assert results[0] == results[1]
    assert results[0].token_ids == [output.token_ids[0] for output in alone]
    assert results[0].logprobs == [output.logprobs[0] for output in alone]


def chi_square_limit(degrees, z=4.0):
    """The 1 - 3e-5 quantile, by Wilson and Hilferty."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_filtered_distribution(params):
    num_draws, vocab_size = 8000, 30
    logits = np.random.default_rng(2).normal(0, 1.5, (1, vocab_size)).astype(np.float32)
    row = SamplingRow(sampling(**params), 11, 0, prompt_token_ids=[0, 1, 2], output_token_ids=[2, 2, 3])
    rows = [dataclasses.replace(row, position=position) for position in range(num_draws)]
    counts = np.bincount(sample(np.repeat(logits, num_draws, 0), rows).token_ids, minlength=vocab_size)
    processed = process(logits[0], row)
    kept = sorted(kept_tokens(processed.copy(), row.sampling))
    expected = num_draws * softmax(processed[kept] / row.sampling.temperature)
    assert counts.sum() == counts[kept].sum()
    likely = expected > 5  # the approximation's condition
    observed = np.append(counts[kept][likely], counts[kept][~likely].sum())
    expected = np.append(expected[likely], expected[~likely].sum())
    cells = expected > 0
    statistic = ((observed[cells] - expected[cells]) ** 2 / expected[cells]).sum()
    assert statistic < chi_square_limit(cells.sum() - 1)


def tokens_drawn(logits, num_draws=300, **params):
    rows = [SamplingRow(sampling(**params), 5, position) for position in range(num_draws)]
    return set(sample(np.repeat(np.array([logits], np.float32), num_draws, 0), rows).token_ids)


def test_ties_at_the_kth_place_all_stay():
    assert tokens_drawn([1, 2, 1, 1, 0], temperature=1.0, top_k=2) == {0, 1, 2, 3}


def test_top_p_keeps_the_token_that_crosses_the_threshold_and_at_least_one():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert tokens_drawn(logits, temperature=1.0, top_p=0.6) == {0, 1}
    assert tokens_drawn(logits, temperature=1.0, top_p=0.01) == {0}


def test_top_p_sees_what_top_k_left_renormalised():
    # Of the two that top-k leaves the first has 0.625: alone it is enough for 0.6, of all four it isn't.
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert tokens_drawn(logits, temperature=1.0, top_k=2, top_p=0.6) == {0}


def test_min_p_is_relative_to_the_most_probable():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert tokens_drawn(logits, temperature=1.0, min_p=0.25) == {0, 1, 2}
    assert tokens_drawn(logits, temperature=1.0, min_p=1.0) == {0}


def test_a_wide_nucleus_is_drawn_from_as_a_whole():
    # Uniform logits: far more tokens than the shortcut looks at, and all of them tie.
    drawn = tokens_drawn(np.zeros(1000), num_draws=3000, temperature=1.0, top_p=0.5)
    assert max(drawn) < 501
    assert len(drawn) > 480


def test_greedy_ignores_temperature_and_filters_and_takes_the_lowest_of_equals():
    params = SamplingParams(strategy=DecodingStrategy.GREEDY, temperature=5.0, top_k=2, top_p=0.1)
    rows = [SamplingRow(params, seed, 0) for seed in range(20)]
    assert set(sample(np.repeat(np.float32([[0, 3, 3, 1]]), 20, 0), rows).token_ids) == {1}


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-4])
def test_a_vanishing_temperature_is_greedy(temperature):
    logits = np.random.default_rng(0).normal(0, 1, (1, 50)).astype(np.float32)
    assert tokens_drawn(logits[0], temperature=temperature) == {int(logits.argmax())}


def test_a_bias_of_100_wins_and_of_minus_100_loses():
    rows = [
        SamplingRow(SamplingParams(logit_bias={2: 100.0}), 0, 0),
        SamplingRow(SamplingParams(logit_bias={1: -100.0}), 0, 0),
    ]
    assert sample(np.float32([[0, 3, 1], [0, 3, 1]]), rows).token_ids == [2, 2]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.99}])
def test_banned_and_not_allowed_tokens_never_come(params):
    logits = np.zeros((400, 40), np.float32)
    logits[:, 7] = 3.0
    parameters = SamplingParams(**params)
    banned = [SamplingRow(parameters, 1, i, banned_token_ids=[7]) for i in range(200)]
    allowed = [SamplingRow(parameters, 1, i, allowed_token_ids=[3, 4, 99]) for i in range(200)]
    tokens = sample(logits, banned + allowed).token_ids
    assert 7 not in tokens[:200]
    assert set(tokens[200:]) <= {3, 4}


def test_another_position_or_seed_is_another_number():
    logits = np.zeros((1, 1000), np.float32)
    params = sampling(temperature=1.0)
    drawn = {sample(logits, [SamplingRow(params, s, p)]).token_ids[0] for s in range(4) for p in range(4)}
    assert len(drawn) > 12


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.9}]
)
def test_a_broken_row_harms_no_other(bad, params):
    logits = np.random.default_rng(3).normal(0, 2, (3, 2000)).astype(np.float32)
    rows = [SamplingRow(SamplingParams(**params), 1, i) for i in range(3)]
    whole = sample(logits, rows).token_ids
    logits[1] = bad
    tokens = sample(logits, rows).token_ids
    assert (tokens[0], tokens[2]) == (whole[0], whole[2])
    assert 0 <= tokens[1] < 2000


def test_masks_win_over_stop_tokens_unless_others_are_left():
    """What a grammar allows is all that counts; end tokens are held back while it allows anything else."""
    request = EngineCoreRequest("r", [7], SamplingParams(min_tokens=5, max_tokens=9), eos_token_ids=frozenset({2}))
    for bits, expected in ((0b1100, 0b1000), (0b0100, 0b0100)):
        row = SamplingRow.from_request(request, [7], FixedMask(bits))
        assert row.banned_token_ids == ()
        assert row.mask.tolist() == [expected]
        assert not row.takes_most_probable
    ignoring = dataclasses.replace(request, sampling=SamplingParams(ignore_eos=True))
    assert SamplingRow.from_request(ignoring, [7], FixedMask(0b1100)).mask.tolist() == [0b1000]


class FixedMask:
    """A matcher that allows the same tokens always."""

    def __init__(self, bits):
        self.allowed = np.array([bits], dtype=np.int32)


def test_a_second_token_is_reported_beside_the_one_drawn():
    params = SamplingParams(logprobs=1)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 3)
    mask = np.array([0b0011], dtype=np.int32)
    rows = [
        SamplingRow(params, 0, 0),
        SamplingRow(params, 0, 0, mask=mask, fallback_token_id=0),
        SamplingRow(SamplingParams(), 0, 0, mask=mask),
    ]
    found = Sampler()(logits.clone(), SamplingMetadata.from_requests(rows))
    expected = torch.log_softmax(logits[0], 0)
    assert found.token_ids == [3, 1, 1]
    assert list(found.fallback_logprobs) == [1]
    assert found.logprobs[1].logprob == pytest.approx(expected[1].item())
    fallback = found.fallback_logprobs[1]
    assert (fallback.token_id, fallback.rank) == (0, 4)
    assert fallback.logprob == pytest.approx(expected[0].item())
