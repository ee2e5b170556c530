"""Paged attention against a plain float64 formula, and its bits under every change of company and layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sagellm_backend import AttentionMetadata, KVLayout
from sagellm_backend.kv import allocate_kv_cache
from sagellm_backend.reference import copy_blocks, paged_attention, reshape_and_cache


@dataclass(frozen=True)
class Case:
    """Requests with their whole K and V, to be computed in steps of any shape."""

    q: list[Tensor]  # a request: [tokens, H, D]
    k: list[Tensor]  # [tokens, KH, D]
    v: list[Tensor]
    scale: float
    window: int = 0
    soft_cap: float = 0.0
    dtype: torch.dtype = torch.float32

    @property
    def lens(self) -> list[int]:
        return [len(q) for q in self.q]


def make_case(lens: list[int], *, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, **options: object) -> Case:
    generator = torch.Generator().manual_seed(sum(lens) + heads)

    def randn(count: int) -> list[Tensor]:
        return [torch.randn(n, count, head_dim, generator=generator) * 2 for n in lens]

    return Case(randn(heads), randn(kv_heads), randn(kv_heads), head_dim**-0.5, **options)  # type: ignore[arg-type]


def naive(case: Case, r: int) -> Tensor:
    """The formula in float64, over the dense keys and values of one request: [tokens, H, D]."""
    q, k, v = (t.double() for t in (case.q[r], case.k[r].to(case.dtype), case.v[r].to(case.dtype)))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * case.scale
    if case.soft_cap:
        scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (distance < 0) | (
        (distance >= case.window) if case.window else torch.zeros_like(distance, dtype=torch.bool)
    )
    weights = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
    return torch.einsum("hqk,khd->qhd", weights, v)


class Cache:
    """A paged cache with the requests' block tables, blocks handed out in a given order."""

    def __init__(self, case: Case, block_size: int, *, seed: int = 0, fill: float = 0.0) -> None:
        self.case, self.block_size = case, block_size
        counts = [-(-n // block_size) for n in case.lens]
        order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        _, kv_heads, head_dim = case.k[0].shape
        layout = KVLayout(1, kv_heads, head_dim, block_size, case.dtype)
        self.kv = allocate_kv_cache(layout, sum(counts) + 2, torch.device("cpu"))[0].fill_(fill)

    def step(self, parts: list[tuple[int, int, int]]) -> dict[int, Tensor]:
        """Write and attend tokens start..end of each (request, start, end); the rows by request."""
        parts = sorted(parts, key=lambda part: part[2] - part[1] != 1)  # single tokens first
        case = self.case
        meta = AttentionMetadata.build(
            query_lens=[end - start for _, start, end in parts],
            context_lens=[end for _, _, end in parts],
            block_tables=[self.tables[r] for r, _, _ in parts],
            block_size=self.block_size,
        )
        q, k, v = (torch.cat([t[r][a:b] for r, a, b in parts]) for t in (case.q, case.k, case.v))
        reshape_and_cache(k, v, self.kv, meta.slot_mapping)
        out = paged_attention(q, self.kv, meta, case.scale, sliding_window=case.window, soft_cap=case.soft_cap)
        rows = torch.split(out, [end - start for _, start, end in parts])
        return {r: row for (r, _, _), row in zip(parts, rows, strict=True)}


def alone(case: Case, block_size: int = 16) -> list[Tensor]:
    """Each request by itself, its whole context in one step."""
    results = []
    for r, n in enumerate(case.lens):
        single = replace(case, q=[case.q[r]], k=[case.k[r]], v=[case.v[r]])
        results.append(Cache(single, block_size).step([(0, 0, n)])[0])
    return results


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1), (14, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80])
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (7, 0.0), (300, 0.0), (0, 5.0), (40, 3.0)])
def test_it_is_the_formula(heads: tuple[int, int], head_dim: int, window: int, soft_cap: float) -> None:
    case = make_case(
        [1, 5, 300], heads=heads[0], kv_heads=heads[1], head_dim=head_dim, window=window, soft_cap=soft_cap
    )
    rows = Cache(case, 16).step([(r, 0, n) for r, n in enumerate(case.lens)])
    for r in range(3):
        torch.testing.assert_close(rows[r].double(), naive(case, r), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_cache_rounds_keys_and_values_only(dtype: torch.dtype) -> None:
    case = make_case([70], dtype=dtype)
    torch.testing.assert_close(Cache(case, 16).step([(0, 0, 70)])[0].double(), naive(case, 0), rtol=1e-5, atol=1e-5)


def test_queries_of_a_narrow_dtype_get_answers_of_that_dtype() -> None:
    case = make_case([20])
    narrow = replace(case, q=[case.q[0].bfloat16()])
    out = Cache(narrow, 16).step([(0, 0, 20)])[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), naive(narrow, 0), rtol=1e-2, atol=1e-2)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Case, list[list[tuple[int, int, int]]], int, int]:
    """A case, steps that compute it in some order and company, a block size and a block permutation."""
    lens = draw(st.lists(st.sampled_from([1, 2, 9, 33, 255, 256, 257, 300, 530]), min_size=1, max_size=4))
    heads, kv_heads = draw(st.sampled_from([(2, 2), (4, 2), (7, 1)]))
    window = draw(st.sampled_from([0, 1, 5, 100, 260]))
    case = make_case(lens, heads=heads, kv_heads=kv_heads, window=window, soft_cap=draw(st.sampled_from([0.0, 4.0])))
    sizes = draw(st.lists(st.sampled_from([1, 2, 16, 64, 250, 600]), min_size=1, max_size=4))
    random = Random(draw(st.integers(0, 99)))
    done = [0] * len(lens)
    steps = []
    while done != lens:
        waiting = [r for r, n in enumerate(lens) if done[r] < n]
        step = []
        for r in random.sample(waiting, random.randint(1, len(waiting))):
            end = min(done[r] + random.choice(sizes), lens[r])
            step.append((r, done[r], end))
            done[r] = end
        steps.append(step)
    return case, steps, draw(st.sampled_from([4, 8, 16, 24, 32, 512])), random.randrange(100)


@settings(max_examples=25, deadline=None)
@given(schedules())
def test_no_bit_depends_on_chunks_batch_blocks_or_what_others_left(
    schedule: tuple[Case, list[list[tuple[int, int, int]]], int, int],
) -> None:
    case, steps, block_size, seed = schedule
    expected = alone(case)
    cache = Cache(case, block_size, seed=seed, fill=math.nan)
    for step in steps:
        rows = cache.step(list(step))
        for r, start, end in step:
            assert torch.equal(rows[r], expected[r][start:end]), (r, start, end)


def test_many_decodes_at_once_equal_each_alone() -> None:
    lens = [1 + 37 * i % 600 for i in range(32)]
    case = make_case(lens, heads=8, kv_heads=2, head_dim=32)
    cache = Cache(case, 16)
    cache.step([(r, 0, n - 1) for r, n in enumerate(lens) if n > 1])
    together = cache.step([(r, n - 1, n) for r, n in enumerate(lens)])
    for r, row in enumerate(alone(case)):
        assert torch.equal(together[r][0], row[-1]), r


def test_the_window_frees_what_left_it() -> None:
    """Tokens that fell out of the window may have lost their blocks to another request."""
    case = make_case([700], window=20)
    cache = Cache(case, 16)
    cache.step([(0, 0, 690)])
    for block in cache.tables[0][: (690 - 20) // 16]:
        cache.kv[:, block] = math.nan
    expected = alone(case)[0]
    assert torch.equal(cache.step([(0, 690, 699)])[0], expected[690:699])
    assert torch.equal(cache.step([(0, 699, 700)])[0], expected[699:])


def test_slots_below_zero_are_not_written() -> None:
    kv = torch.zeros(2, 3, 1, 4, 2)
    k = torch.arange(6.0).reshape(3, 1, 2) + 1
    reshape_and_cache(k, -k, kv, torch.tensor([9, -1, 2]))
    assert kv[0, 2, 0, 1].tolist() == [1, 2]
    assert kv[1, 0, 0, 2].tolist() == [-5, -6]
    assert int((kv != 0).sum()) == 8


def test_an_int8_cache_is_as_near_as_its_scale_says() -> None:
    """Attention to one's own token alone gives its value: off by half a step of 1 / 127 of the largest number."""
    q, k, v = torch.randn(3, 5, 2, 16, generator=torch.Generator().manual_seed(1)).unbind()
    v[3] = 0.0
    kv = torch.full((2, 5, 2, 4, 16 + 4), -1, dtype=torch.int8)
    meta = AttentionMetadata.build(
        query_lens=[1] * 5, context_lens=[1] * 5, block_tables=[[4], [2], [0], [1], [3]], block_size=4
    )
    reshape_and_cache(k, v, kv, meta.slot_mapping)
    out = paged_attention(q, kv, meta, 0.25)
    assert bool(((out - v).abs() <= v.abs().amax(-1, keepdim=True) / 254 + 1e-6).all())
    largest = v.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(out.gather(-1, largest), v.gather(-1, largest))


def test_blocks_are_copied_as_they_were_before() -> None:
    kv = torch.arange(2 * 4 * 3).reshape(2, 4, 1, 3, 1).float()
    before = kv.clone()
    copy_blocks(kv, torch.tensor([[0, 1], [1, 2]]))
    assert torch.equal(kv[:, 1], before[:, 0])
    assert torch.equal(kv[:, 2], before[:, 1])
    assert torch.equal(kv[:, [0, 3]], before[:, [0, 3]])


def test_metadata_keeps_what_was_derived_once_a_step() -> None:
    meta = AttentionMetadata.build(query_lens=[1, 3], context_lens=[5, 3], block_tables=[[1], [2]], block_size=8)
    calls = []
    for _ in range(2):
        assert meta.derived("test", lambda m: calls.append(m) or 7) == 7  # type: ignore[func-returns-value]
    assert calls == [meta]
    assert (meta.num_requests, meta.num_tokens, meta.num_decodes) == (2, 4, 1)
    assert meta.slot_mapping.tolist() == [12, 16, 17, 18]
    assert meta.positions.tolist() == [4, 0, 1, 2]
