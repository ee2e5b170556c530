"""Native paged attention and cache writes against the reference, and their bits in any company, chunking and layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sagellm_backend import AttentionMetadata, reference

if TYPE_CHECKING:
    from sagellm_backend.cpu.native import NativeOps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Requests:
    """Requests with their whole queries, keys and values, and a paged cache for them filled with garbage."""

    def __init__(
        self,
        lens: list[int],
        *,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(lens))
        shapes = [(n, count, head_dim) for n in lens for count in (heads[0], heads[1], heads[1])]
        tensors = [torch.randn(shape, generator=generator) * 1.5 for shape in shapes]
        self.q, self.k, self.v = tensors[0::3], tensors[1::3], tensors[2::3]
        self.lens, self.block_size, self.scale = lens, block_size, head_dim**-0.5
        counts = [-(-n // block_size) for n in lens]
        order = torch.randperm(sum(counts) + 1, generator=generator).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        self.cache = torch.full((2, sum(counts) + 1, heads[1], block_size, head_dim), float("nan"), dtype=dtype)

    def step(self, ops: object, parts: list[tuple[int, int, int]], **options: float) -> list[Tensor]:
        """Write and attend tokens start..end of each (request, start, end), single tokens first; their rows."""
        meta = AttentionMetadata.build(
            query_lens=[end - start for _, start, end in parts],
            context_lens=[end for _, _, end in parts],
            block_tables=[self.tables[r] for r, _, _ in parts],
            block_size=self.block_size,
        )
        q, k, v = (torch.cat([t[r][start:end] for r, start, end in parts]) for t in (self.q, self.k, self.v))
        ops.reshape_and_cache(k, v, self.cache, meta.slot_mapping)  # type: ignore[attr-defined]
        out = ops.paged_attention(q, self.cache, meta, self.scale, **options)  # type: ignore[attr-defined]
        return list(torch.split(out, [end - start for _, start, end in parts]))

    def whole(self, ops: object, **options: float) -> list[Tensor]:
        """All requests at once, each in one piece."""
        order = sorted(range(len(self.lens)), key=lambda r: self.lens[r] != 1)
        rows = self.step(ops, [(r, 0, self.lens[r]) for r in order], **options)
        return [rows[order.index(r)] for r in range(len(order))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 1), (14, 2)], ids=str)
def test_it_is_the_reference(ops: NativeOps, heads: tuple[int, int], dtype: torch.dtype) -> None:
    lens = [1, 3, 40] if ops.name == "generic" else [1, 3, 40, 600]
    requests = Requests(lens, heads=heads, dtype=dtype)
    for rows, expected in zip(requests.whole(ops), requests.whole(reference), strict=True):
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [8, 16, 80, 128])
@pytest.mark.parametrize(
    "options",
    [{"sliding_window": 7}, {"sliding_window": 260}, {"soft_cap": 5.0}, {"sliding_window": 30, "soft_cap": 2.0}],
    ids=str,
)
def test_windows_and_caps(ops: NativeOps, head_dim: int, options: dict[str, float]) -> None:
    requests = Requests([1, 50] if ops.name == "generic" else [1, 300], head_dim=head_dim)
    for rows, expected in zip(requests.whole(ops, **options), requests.whole(reference, **options), strict=True):
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 40, "soft_cap": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_instruction_sets_agree_to_the_bit(
    ops: NativeOps, portable_ops: NativeOps, dtype: torch.dtype, options: dict[str, float]
) -> None:
    requests = Requests([1, 60, 270], heads=(3, 1), head_dim=16, dtype=dtype)
    rows = requests.whole(ops, **options)
    written = requests.cache.clone()
    assert all(map(torch.equal, rows, requests.whole(portable_ops, **options)))
    assert torch.equal(written.nan_to_num(), requests.cache.nan_to_num())


@pytest.mark.parametrize("options", [{}, {"sliding_window": 33}], ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 40])
def test_company_chunks_and_blocks_change_nothing(ops: NativeOps, block_size: int, options: dict[str, float]) -> None:
    lens = [70, 20] if ops.name == "generic" else [530, 90]
    alone = [Requests(lens, block_size=16).step(ops, [(r, 0, n)], **options)[0] for r, n in enumerate(lens)]
    for chunk in (1, 7, 64):
        requests = Requests(lens, block_size=block_size)
        last = lens[0] - chunk
        requests.step(ops, [(0, 0, last)], **options)  # a prefill, then a chunk in company
        pieces = [(0, last, lens[0]), (1, 0, lens[1])]
        first, second = requests.step(ops, pieces, **options)
        assert torch.equal(first, alone[0][last:])
        assert torch.equal(second, alone[1])


def test_the_number_of_threads_changes_nothing(ops: NativeOps) -> None:
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(Requests([120, 200], heads=(4, 1)).whole(ops))
    for rows in results[1:]:
        assert all(map(torch.equal, rows, results[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cache_writes_round_like_torch(ops: NativeOps, dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1.0000001, 65519.0, 65520.0, 1e-8, 6e-8, -3e-5, 3.4e38, 1e-40, float("inf")])
    k = torch.randn(6, 2, 16)
    k[0, 0, :11] = special
    v = -k
    slots = torch.tensor([5, -1, 17, 0, 31, 16])
    mine, theirs = (torch.zeros(2, 3, 2, 16, 16, dtype=dtype) for _ in range(2))
    ops.reshape_and_cache(k, v, mine, slots)
    reference.reshape_and_cache(k, v, theirs, slots)
    assert torch.equal(mine, theirs)


def test_queries_keys_and_values_may_be_slices_of_a_fused_row(ops: NativeOps) -> None:
    fused = torch.randn(9, (4 + 2 + 2) * 16)
    q, k, v = (part.view(9, -1, 16) for part in fused.split([64, 32, 32], dim=1))
    meta = AttentionMetadata.build(query_lens=[9], context_lens=[9], block_tables=[[1]], block_size=16)
    results = []
    for tensors in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous())):
        cache = torch.zeros(2, 2, 2, 16, 16)
        ops.reshape_and_cache(tensors[1], tensors[2], cache, meta.slot_mapping)
        results.append(ops.paged_attention(tensors[0], cache, meta, 0.25))
    assert torch.equal(*results)
