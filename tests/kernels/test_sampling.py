"""`sample_tokens`: the reference's tokens, the same on every ISA, number of threads and in any company."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_backend import reference

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sagellm_backend.cpu.native import NativeOps

Shape = Callable[[np.random.Generator, int], "NDArray[np.float64]"]
GREEDY = (0.0, 0.0, 1.0, 0.0, 0.5)
SHARED_FIXTURE = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def normal(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    return rng.normal(0, 3, size)


def peaked(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """As a trained model's: a few tokens far above the others."""
    row = rng.normal(0, 2, size)
    row[rng.integers(0, size, 20)] += rng.uniform(8, 14, 20)
    return row


def tied(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    return np.round(rng.normal(0, 2, size))


def equal(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    return np.full(size, rng.choice([0.0, -3.5, 1e4]))


def one_alive(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    row = np.full(size, -np.inf)
    row[rng.integers(size)] = rng.choice([0.0, -1e30, 1e30])
    return row


def some_alive(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    row = np.where(rng.random(size) < 0.05, rng.normal(0, 3, size), -np.inf)
    row[rng.integers(size)] = 1.0
    return row


def huge(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    return rng.normal(0, 1e37, size)


def tiny(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    return rng.normal(0, 1e-38, size)


SHAPES: list[Shape] = [normal, peaked, tied, equal, one_alive, some_alive, huge, tiny]
SIZES = [1, 2, 15, 16, 17, 255, 256, 257, 1000, 5000, 20_000]
WANTED = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    st.sampled_from([0.0, 0.0, 1.0, 3.0, 50.0, 1030.0, 1e6]),
    st.sampled_from([1.0, 1.0, 0.2, 0.9, 0.999]),
    st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    st.floats(2.0**-53, 1 - 2.0**-53),
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    size = draw(st.sampled_from(SIZES))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    wanted = draw(st.lists(WANTED, min_size=1, max_size=5))
    logits = np.stack([draw(st.sampled_from(SHAPES))(rng, size) for _ in wanted]).astype(np.float32)
    return torch.from_numpy(logits), torch.tensor(wanted, dtype=torch.float64)


def distance_to_border(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far the uniform is from the nearest border of two tokens, in the filtered distribution in float64."""
    temperature, top_k, top_p, min_p, uniform = wanted.tolist()
    row = logits.double().numpy()
    weights = np.exp((row - row.max()) / np.float64(np.float32(temperature)))
    order = np.arange(len(row))
    if 0 < top_k < len(row) or top_p < 1:
        order = np.lexsort((order, -row))
        if 0 < top_k < len(row):
            order = order[row[order] >= row[order[int(top_k) - 1]]]
        before = np.cumsum(weights[order]) - weights[order]
        order = order[(before < top_p * weights[order].sum()) | (np.arange(len(order)) == 0) | (top_p == 1)]
    order = order[weights[order] >= min_p]
    cumulative = np.cumsum(weights[order])
    return float(np.abs(cumulative / cumulative[-1] - uniform).min())


@SHARED_FIXTURE
@given(batch=batches())
def test_the_reference_draws_the_same(ops: NativeOps, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, wanted = batch
    found = ops.sample_tokens(logits, wanted).tolist()
    expected = reference.sample_tokens(logits, wanted).tolist()
    for i, (token, other) in enumerate(zip(found, expected, strict=True)):
        assert token == other or (wanted[i, 0] > 0 and distance_to_border(logits[i], wanted[i]) < 1e-5)


@SHARED_FIXTURE
@given(batch=batches())
def test_isa_threads_and_company_change_nothing(
    ops: NativeOps, portable_ops: NativeOps, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, wanted = batch
    found = ops.sample_tokens(logits, wanted).tolist()
    assert found == portable_ops.sample_tokens(logits, wanted).tolist()
    assert found == [int(ops.sample_tokens(logits[i : i + 1], wanted[i : i + 1])) for i in range(len(logits))]


@pytest.mark.parametrize("shape", [normal, peaked, tied, equal])
@pytest.mark.parametrize(
    "wanted",
    [GREEDY, (0.8, 0, 1, 0), (0.8, 0, 1, 0.05), (0.8, 50, 0.9, 0.05), (1.5, 0, 0.99, 0), (1.0, 5000, 1.0, 0)],
    ids=str,
)
def test_threads_share_a_large_vocabulary(
    ops: NativeOps, portable_ops: NativeOps, shape: Shape, wanted: tuple[float, ...]
) -> None:
    rng = np.random.default_rng(7)
    logits = torch.from_numpy(np.stack([shape(rng, 151_936) for _ in range(3)]).astype(np.float32))
    rows = torch.tensor([(*wanted[:4], uniform) for uniform in (0.03, 0.5, 0.98)], dtype=torch.float64)
    results = []
    for num_threads in (1, 2, 3, 4):
        torch.set_num_threads(num_threads)
        results.append(ops.sample_tokens(logits, rows).tolist())
        results.append([int(ops.sample_tokens(logits[i : i + 1], rows[i : i + 1])) for i in range(3)])
    torch.set_num_threads(2)
    results.append(portable_ops.sample_tokens(logits, rows).tolist())
    assert all(result == results[0] for result in results), results
    for i, (token, other) in enumerate(zip(results[0], reference.sample_tokens(logits, rows).tolist(), strict=True)):
        assert token == other or distance_to_border(logits[i], rows[i]) < 1e-5


@SHARED_FIXTURE
@given(
    wanted=WANTED,
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    size=st.sampled_from(SIZES),
    share=st.sampled_from([0.1, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_broken_rows_give_some_token_and_harm_no_other(
    ops: NativeOps, wanted: tuple[float, ...], bad: float, size: int, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (3, size)).astype(np.float32))
    rows = torch.tensor([wanted] * 3, dtype=torch.float64)
    whole = ops.sample_tokens(logits, rows).tolist()
    broken = torch.from_numpy(rng.random(size) < share)
    logits[1, broken] = bad
    tokens = ops.sample_tokens(logits, rows).tolist()
    assert (tokens[0], tokens[2]) == (whole[0], whole[2])
    assert 0 <= tokens[1] < size
    if bad == np.inf:
        assert logits[1, tokens[1]] == bad or not broken.any()
    elif not broken.all():
        assert logits[1, tokens[1]] > -torch.inf


@pytest.mark.parametrize(
    "wanted",
    [(1.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.1), (1.5, 7, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.2, 12, 0.9, 0.05)],
    ids=str,
)
def test_tokens_come_as_often_as_their_probabilities_say(ops: NativeOps, wanted: tuple[float, ...]) -> None:
    num_draws, size = 20_000, 40
    rng = np.random.default_rng(3)
    row = torch.from_numpy(rng.normal(0, 1.5, size).astype(np.float32))
    # Numbers at equal distances: each token comes its probability times num_draws, within the one at either border.
    uniforms = (np.arange(num_draws) + 0.5) / num_draws
    rows = torch.tensor([(*wanted, uniform) for uniform in uniforms], dtype=torch.float64)
    counts = np.bincount(ops.sample_tokens(row.expand(num_draws, -1), rows), minlength=size)
    temperature, top_k, top_p, min_p = wanted
    weights = np.exp((row.double().numpy() - float(row.max())) / temperature)
    order = np.argsort(-weights)[: int(top_k) or None]
    before = np.cumsum(weights[order]) - weights[order]
    order = order[(before < top_p * weights[order].sum()) & (weights[order] >= min_p)]
    expected = np.zeros(size)
    expected[order] = weights[order] / weights[order].sum() * num_draws
    assert np.abs(counts - expected).max() <= 2


def test_ties_at_the_kth_place_all_stay(ops: NativeOps) -> None:
    row = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    rows = torch.tensor([(1.0, 2, 1.0, 0.0, (i + 0.5) / 100) for i in range(100)], dtype=torch.float64)
    assert set(ops.sample_tokens(row.expand(100, -1), rows).tolist()) == {0, 1, 2, 3}


def test_strided_rows_and_other_dtypes(ops: NativeOps) -> None:
    wide = torch.randn(4, 600)
    rows = torch.tensor([(1.0, 5, 0.9, 0.0, 0.3)] * 4, dtype=torch.float64)
    part = wide[:, 100:500]
    assert torch.equal(ops.sample_tokens(part, rows), ops.sample_tokens(part.contiguous(), rows))
    assert ops.sample_tokens(wide.double(), rows).shape == (4,)
    assert ops.sample_tokens(wide[:0], rows[:0]).shape == (0,)
