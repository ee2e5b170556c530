"""Native paged attention and cache writes against the reference, and their bits in any company, chunking and layout."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sagellm_backend import AttentionMetadata, reference
from sagellm_backend.kv import entry_size

if TYPE_CHECKING:
    from sagellm_backend.cpu.native import NativeOps

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
# float32 products stay float32; for a bfloat16 or int8 cache queries and weights are rounded to 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 1e-5, torch.int8: 4e-2}


@dataclasses.dataclass
class Options:
    """What the attention ops take beside the tensors."""

    sliding_window: int = 0
    soft_cap: float = 0.0


class Requests:
    """Requests with their whole queries, keys and values, and paged caches for them filled with garbage."""

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
        shape = (2, sum(counts) + 1, heads[1], block_size, entry_size(head_dim, dtype))
        if dtype is torch.int8:
            garbage = torch.full((*shape[:-1], shape[-1] // 4), float("nan")).view(torch.int8)
        else:
            garbage = torch.full(shape, float("nan"), dtype=dtype)
        self.cache, self.plain_cache = garbage, garbage.clone()

    def step(self, ops: object, parts: list[tuple[int, int, int]], options: Options | None = None) -> list[Tensor]:
        """Write and attend tokens start..end of each (request, start, end), single tokens first; their rows."""
        meta = AttentionMetadata.build(
            query_lens=[end - start for _, start, end in parts],
            context_lens=[end for _, _, end in parts],
            block_tables=[self.tables[r] for r, _, _ in parts],
            block_size=self.block_size,
        )
        q, k, v = (torch.cat([t[r][start:end] for r, start, end in parts]) for t in (self.q, self.k, self.v))
        cache = self.plain_cache if ops is reference else self.cache
        ops.reshape_and_cache(k, v, cache, meta.slot_mapping)  # type: ignore[attr-defined]
        kwargs = dataclasses.asdict(options or Options())
        out = ops.paged_attention(q, cache, meta, self.scale, **kwargs)  # type: ignore[attr-defined]
        return list(torch.split(out, [end - start for _, start, end in parts]))

    def whole(self, ops: object, options: Options | None = None) -> list[Tensor]:
        """All requests at once, each in one piece."""
        order = sorted(range(len(self.lens)), key=lambda r: self.lens[r] != 1)
        rows = self.step(ops, [(r, 0, self.lens[r]) for r in order], options)
        return [rows[order.index(r)] for r in range(len(order))]

    def in_chunks(self, ops: object, sizes: list[int], options: Options | None = None) -> list[Tensor]:
        """All requests side by side, request r in chunks of `sizes[r]` tokens."""
        rows: list[list[Tensor]] = [[] for _ in self.lens]
        done = [0] * len(self.lens)
        while any(start < n for start, n in zip(done, self.lens, strict=True)):
            live = [r for r, n in enumerate(self.lens) if done[r] < n]
            parts = [(r, done[r], min(self.lens[r], done[r] + sizes[r])) for r in live]
            parts.sort(key=lambda part: part[2] - part[1] != 1)
            for (r, _, end), part in zip(parts, self.step(ops, parts, options), strict=True):
                rows[r].append(part)
                done[r] = end
        return [torch.cat(parts) for parts in rows]


def plain_order(cache: Tensor) -> Tensor:
    """The numbers of a native cache where the reference has them; see csrc/cpu/kv_cache.h."""
    _, blocks, heads, size, entry = cache.shape
    dim = entry - entry_size(0, cache.dtype)
    flat = cache.view(2, blocks, heads, size * entry)
    numbers, scales = flat[..., : size * dim], flat[..., size * dim :]
    pair = 2 if cache.dtype in (torch.bfloat16, torch.int8) else 1
    keys = numbers[0].reshape(blocks, heads, dim // pair, size, pair).permute(0, 1, 3, 2, 4)
    values = numbers[1].reshape(blocks, heads, size // pair, dim, pair).permute(0, 1, 2, 4, 3)
    plain = torch.stack([part.reshape(blocks, heads, size, dim) for part in (keys, values)])
    return torch.cat((plain, scales.reshape(2, blocks, heads, size, entry - dim)), dim=-1)


def assert_close(rows: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for mine, theirs in zip(rows, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 1), (14, 2), (11, 1)], ids=str)
def test_it_is_the_reference(ops: NativeOps, heads: tuple[int, int], dtype: torch.dtype) -> None:
    lens = [1, 3, 40] if ops.name == "generic" else [1, 3, 40, 600]
    requests = Requests(lens, heads=heads, dtype=dtype)
    assert_close(requests.whole(ops), requests.whole(reference), dtype)


def test_bfloat16_rounds_queries_and_weights_and_nothing_else(ops: NativeOps) -> None:
    """One visible token: the weight is 1 and the result its value. Two: queries rounded before, weights after."""
    requests = Requests([1, 2], heads=(2, 1), head_dim=32, dtype=torch.bfloat16)
    one, two = requests.whole(ops)
    assert torch.equal(one, requests.v[0].bfloat16().float().expand_as(one))
    q, k, v = (t[1].bfloat16().double() for t in (requests.q, requests.k, requests.v))
    scores = torch.einsum("hd,nhd->hn", q[1], k.expand(2, 2, 32)) * requests.scale
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)).bfloat16().double()
    expected = torch.einsum("hn,nhd->hd", weights / weights.sum(-1, keepdim=True), v.expand(2, 2, 32))
    torch.testing.assert_close(two[1].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("head_dim", [16, 48, 80, 128])
@pytest.mark.parametrize(
    "options", [Options(7), Options(260), Options(soft_cap=5.0), Options(30, 2.0)], ids=lambda o: str(vars(o))
)
def test_windows_and_caps(ops: NativeOps, head_dim: int, options: Options, dtype: torch.dtype) -> None:
    requests = Requests([1, 50] if ops.name == "generic" else [1, 300], head_dim=head_dim, dtype=dtype)
    assert_close(requests.whole(ops, options), requests.whole(reference, options), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 40, 64])
@pytest.mark.parametrize("head_dim", [8, 32])
def test_shapes_that_no_kernel_takes_go_to_the_reference(
    ops: NativeOps, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    requests = Requests([1, 70], head_dim=head_dim, block_size=block_size, dtype=dtype)
    assert_close(requests.whole(ops), requests.whole(reference), dtype)


@pytest.mark.parametrize("options", [Options(), Options(40, 3.0)], ids=["all", "window"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_instruction_sets_agree_to_the_bit(
    ops: NativeOps, portable_ops: NativeOps, dtype: torch.dtype, options: Options
) -> None:
    requests = Requests([1, 60, 271], heads=(3, 1), head_dim=48, dtype=dtype)
    rows = requests.whole(ops, options)
    written = requests.cache.clone()
    assert all(map(torch.equal, rows, requests.whole(portable_ops, options)))
    assert torch.equal(written.view(torch.uint8), requests.cache.view(torch.uint8))


def test_long_contexts_agree_to_the_bit_on_all_instruction_sets(ops: NativeOps, portable_ops: NativeOps) -> None:
    """Segments are merged, by one thread or by several."""
    requests = Requests([2600], heads=(4, 2), head_dim=32, dtype=torch.bfloat16)
    step = [(0, 2597, 2600)]
    requests.step(ops, [(0, 0, 2597)] if ops.name != "generic" else [(0, 2590, 2597)])
    requests.cache.nan_to_num_(0.5)
    torch.set_num_threads(1)
    alone = requests.step(portable_ops, step)[0]
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        assert torch.equal(requests.step(ops, step)[0], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [Options(), Options(33), Options(1500)], ids=lambda o: f"window={o.sliding_window}")
@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_company_chunks_and_blocks_change_nothing(
    ops: NativeOps, block_size: int, options: Options, dtype: torch.dtype
) -> None:
    lens = [70, 20] if ops.name == "generic" else [2300, 90]
    alone = [Requests(lens, dtype=dtype).step(ops, [(r, 0, n)], options)[0] for r, n in enumerate(lens)]
    for chunk in (1, 7, 64):
        requests = Requests(lens, block_size=block_size, dtype=dtype)
        last = lens[0] - chunk
        requests.step(ops, [(0, 0, last)], options)  # a prefill, then a chunk in company
        pieces = [(0, last, lens[0]), (1, 0, lens[1])]
        first, second = requests.step(ops, pieces, options)
        assert torch.equal(first, alone[0][last:])
        assert torch.equal(second, alone[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_decode_is_the_same_alone_and_among_sixty_four(ops: NativeOps, dtype: torch.dtype) -> None:
    most = 60 if ops.name == "generic" else 1300
    lens = [1 + most * r // 63 for r in range(64)]
    requests = Requests(lens, heads=(7, 1), head_dim=16, dtype=dtype)
    requests.whole(ops)
    together = requests.step(ops, [(r, n - 1, n) for r, n in enumerate(lens)])
    for r in (0, 1, 31, 62, 63):
        assert torch.equal(requests.step(ops, [(r, lens[r] - 1, lens[r])])[0], together[r])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_nothing(ops: NativeOps, dtype: torch.dtype) -> None:
    lens = [120, 200] if ops.name == "generic" else [1400, 300]
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        requests = Requests(lens, heads=(4, 1), dtype=dtype)
        results.append(requests.whole(ops) + requests.step(ops, [(0, lens[0] - 1, lens[0])]))
    for rows in results[1:]:
        assert all(map(torch.equal, rows, results[0]))


@settings(deadline=None, max_examples=25)
@given(
    lens=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    chunks=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    group=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 32, 80]),
    block_size=st.sampled_from([16, 48]),
    dtype=st.sampled_from(DTYPES),
    options=st.builds(Options, st.sampled_from([0, 1, 2, 17, 64]), st.sampled_from([0.0, 4.0])),
)
def test_any_chunking_of_any_batch_is_the_reference(
    lens: list[int],
    chunks: list[int],
    group: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    options: Options,
) -> None:
    native = pytest.importorskip("sagellm_backend.cpu.native")
    ops = native.FASTEST
    heads = (group * kv_heads, kv_heads)
    requests = Requests(lens, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    whole = requests.whole(ops, options)
    assert_close(whole, requests.whole(reference, options), dtype)
    again = Requests(lens, heads=heads, head_dim=head_dim, block_size=16, dtype=dtype)
    assert all(map(torch.equal, again.in_chunks(ops, chunks, options), whole))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cache_writes_round_like_torch(ops: NativeOps, dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1.0000001, 65519.0, 65520.0, 1e-8, 6e-8, -3e-5, 3.4e38, 1e-40, float("inf")])
    k = torch.randn(6, 2, 16)
    k[0, 0, :11] = special if dtype is not torch.int8 else special.clamp(max=300.0)
    k[2, 1] = 0.0
    k[3, 0] = torch.arange(16) - 7.5  # ties
    v = -k
    slots = torch.tensor([5, -1, 17, 0, 31, 16])
    mine, theirs = (torch.zeros(2, 3, 2, 16, entry_size(16, dtype), dtype=dtype) for _ in range(2))
    ops.reshape_and_cache(k, v, mine, slots)
    reference.reshape_and_cache(k, v, theirs, slots)
    assert torch.equal(plain_order(mine), theirs)


def test_queries_keys_and_values_may_be_slices_of_a_fused_row(ops: NativeOps) -> None:
    fused = torch.randn(9, (4 + 2 + 2) * 16)
    q, k, v = (part.view(9, -1, 16) for part in fused.split([64, 32, 32], dim=1))
    meta = AttentionMetadata.build(query_lens=[9], context_lens=[9], block_tables=[[1]], block_size=16)
    results = []
    for tensors in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous()), (q.double(), k.double(), v.double())):
        cache = torch.zeros(2, 2, 2, 16, 16)
        ops.reshape_and_cache(tensors[1], tensors[2], cache, meta.slot_mapping)
        results.append(ops.paged_attention(tensors[0], cache, meta, 0.25))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0].double(), results[2])
