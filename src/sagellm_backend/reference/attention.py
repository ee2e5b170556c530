"""Paged attention: write keys and values to their slots, attend over block tables.

Attention reads the context in tiles of `CONTEXT_TILE` tokens at fixed places and merges them in order by online
softmax (Milakov and Gimelshein, 2018; Dao et al., 2022). A tile that a token may not see changes nothing, to the
bit: its weights are exactly 0 and the running maximum stays. So tiles that no row of a product can see are left
out, and neither chunking nor batching nor the block size can change a result.

Each product is a matrix for one (request, KV head) pair: its rows are query tokens times the query heads that
share the KV head. Decodes put all their requests into one batched product; prefills go request by request, in
groups of query rows small enough to stay in the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sagellm_backend.attention import AttentionMetadata
from sagellm_backend.invariance import CONTEXT_TILE, RowPlan, bmm_rows, row_plan
from sagellm_backend.kv import cached_head_dim, entry_size
from sagellm_backend.ops import ANY_KIND, register_op

_SOURCE = "reference"
# Rows of one prefill product, and KV numbers gathered at once for decodes: both bound memory, neither a result.
_PREFILL_ROWS = 384
_DECODE_GATHER = 1 << 22
# Starts the running maximum: finite, so that exp(-inf - maximum) is 0 and never a NaN.
_LOWEST = -1e30


@register_op("reshape_and_cache", kind=ANY_KIND, priority=0, source=_SOURCE)
def reshape_and_cache(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write k and v `[T, KH, D]` to the slots `[T]` of `kv_cache [2, blocks, KH, block_size, D]`.

    A slot is `block * block_size + offset`; slots < 0 are skipped, others must differ from each other. Values are
    rounded to the cache's dtype. An int8 cache, `[.., D + 4]`, takes codes round(x / scale) and behind them the float32
    scale, the largest magnitude of the token's head / 127.
    """
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    block_size = kv_cache.shape[3]
    blocks = torch.div(slot_mapping, block_size, rounding_mode="floor")
    offsets = slot_mapping - blocks * block_size
    kv_cache[0][blocks, :, offsets] = _stored(k, kv_cache.dtype)
    kv_cache[1][blocks, :, offsets] = _stored(v, kv_cache.dtype)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x [.., D]` as a cache of `dtype` holds it."""
    if dtype is not torch.int8:
        return x.to(dtype)
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes = (x / scale).nan_to_num_(nan=0.0).clamp_(-127, 127).round_().to(torch.int8)
    return torch.cat((codes, scale.view(torch.int8)), dim=-1)


def _loaded(stored: Tensor) -> Tensor:
    """What `_stored` made, as numbers."""
    if stored.dtype is not torch.int8:
        return stored
    codes, scale = stored[..., : -entry_size(0, torch.int8)], stored[..., -entry_size(0, torch.int8) :]
    return codes * scale.contiguous().view(torch.float32)


@register_op("copy_blocks", kind=ANY_KIND, priority=0, source=_SOURCE)
def copy_blocks(kv_cache: Tensor, src_dst: Tensor) -> None:
    """Copy whole blocks of one layer: row i of `src_dst [n, 2]` names source and destination; all reads come first."""
    kv_cache[:, src_dst[:, 1]] = kv_cache[:, src_dst[:, 0]]


@register_op("paged_attention", kind=ANY_KIND, priority=0, source=_SOURCE)
def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    meta: AttentionMetadata,
    scale: float,
    *,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Causal attention of q `[T, H, D]` over each token's own request: `[T, H, D]` in the dtype of q.

    `kv_cache [2, blocks, KH, block_size, D]` already holds the step's own tokens. H is a multiple of KH; query head
    h reads KV head `h // (H / KH)`. Scores are `scale * (q . k)`, bounded by `soft_cap * tanh(score / soft_cap)`
    where `soft_cap` > 0. A token sees the last `sliding_window` tokens, itself included (0: all before it).
    Everything is computed in float32. What stands in the cache beyond a request's tokens is never used, whatever
    it is.
    """
    out = torch.empty_like(q)
    heads = _Heads(kv_cache, scale, sliding_window, soft_cap, row_plan("attention", torch.float32, q.device))
    if meta.num_decodes:
        _attend_decodes(heads, q[: meta.num_decodes], meta, out)
    starts, ends = meta.derived("reference.lens", _host_lens)
    for r in range(meta.num_decodes, len(ends)):
        rows = slice(starts[r], starts[r + 1])
        _attend_prefill(heads, q[rows], meta.block_tables[r : r + 1], ends[r], out[rows])
    return out


def _host_lens(meta: AttentionMetadata) -> tuple[list[int], list[int]]:
    """Query starts and context lengths as numbers; read from the device once a step."""
    return meta.query_start_loc.tolist(), meta.context_lens.tolist()


@dataclass(frozen=True, slots=True)
class _Heads:
    """What stays the same for all products of one call."""

    kv_cache: Tensor
    scale: float
    window: int
    soft_cap: float
    plan: RowPlan

    def rows(self, q: Tensor) -> Tensor:
        """Queries `[R, Q, H, D]` as padded, scaled float32 rows `[R * KH, M, D]`; row = query * (H / KH) + head."""
        num_requests, num_queries, num_heads, head_dim = q.shape
        num_kv_heads = self.kv_cache.shape[2]
        grouped = q.view(num_requests, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
        rows = grouped.permute(0, 2, 1, 3, 4).float() * self.scale
        return self.plan.pad(rows.reshape(num_requests * num_kv_heads, -1, head_dim))


@dataclass(frozen=True, slots=True)
class _TileIndex:
    """Where one tile of each of n requests lies in the cache: whole blocks, or blocks and offsets token by token."""

    num_requests: int
    blocks: Tensor  # [n * blocks a tile], or [n, CONTEXT_TILE] where offsets are given
    offsets: Tensor | None  # [n, CONTEXT_TILE]; None where tiles are made of whole blocks

    @classmethod
    def of(cls, block_tables: Tensor, tiles: Tensor, block_size: int) -> _TileIndex:
        """Tile `tiles[r]` of the request with block table r; tokens behind the table read its last column."""
        last_column = block_tables.shape[1] - 1
        if CONTEXT_TILE % block_size == 0:
            per_tile = CONTEXT_TILE // block_size
            columns = tiles[:, None] * per_tile + torch.arange(per_tile, device=tiles.device)
            return cls(len(tiles), block_tables.gather(1, columns.clamp_(max=last_column)).flatten(), None)
        positions = tiles[:, None] * CONTEXT_TILE + torch.arange(CONTEXT_TILE, device=tiles.device)
        columns = torch.div(positions, block_size, rounding_mode="floor")
        blocks = block_tables.gather(1, columns.clamp(max=last_column))
        return cls(len(tiles), blocks.long(), positions - columns * block_size)

    def read(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the tiles, each `[n * KH, CONTEXT_TILE, D]` float32."""
        _, _, num_kv_heads, block_size, entry = kv_cache.shape
        head_dim = cached_head_dim(kv_cache)
        n = self.num_requests
        tile = torch.empty(2, n, num_kv_heads, CONTEXT_TILE, head_dim, device=kv_cache.device)
        for kv in (0, 1):
            if self.offsets is None:
                blocks = _loaded(kv_cache[kv].index_select(0, self.blocks).view(n, -1, num_kv_heads, block_size, entry))
                tile[kv].view(n, num_kv_heads, -1, block_size, head_dim).copy_(blocks.transpose(1, 2))
            else:
                tile[kv].transpose(1, 2).copy_(_loaded(kv_cache[kv][self.blocks, :, self.offsets]))
        keys, values = tile.view(2, n * num_kv_heads, CONTEXT_TILE, head_dim)
        return keys, values


class _OnlineSoftmax:
    """The running softmax-weighted sum of the values for one product's rows `[B, M, D]`, over the tiles so far."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._peak = rows.new_full((*rows.shape[:2], 1), _LOWEST)
        self._total = torch.zeros_like(self._peak)
        self._sum = torch.zeros_like(rows)

    def scores(self, heads: _Heads, keys: Tensor) -> Tensor:
        """Scores of the first B' matrices against keys `[B', CONTEXT_TILE, D]`, to be masked by the caller."""
        scores = bmm_rows(self._rows[: len(keys)], keys.transpose(1, 2), heads.plan)
        if heads.soft_cap > 0:
            scores.div_(heads.soft_cap).tanh_().mul_(heads.soft_cap)
        return scores

    def add(self, heads: _Heads, scores: Tensor, values: Tensor) -> None:
        """Take in a tile for the first B' matrices; a score of -inf hides its token. Overwrites the scores."""
        n = len(scores)
        peak = torch.maximum(self._peak[:n], scores.amax(-1, keepdim=True))
        weights = scores.sub_(peak).exp_()
        decay = torch.exp(self._peak[:n] - peak)
        self._total[:n].mul_(decay).add_(weights.sum(-1, keepdim=True))
        self._sum[:n].mul_(decay).add_(bmm_rows(weights, values, heads.plan))
        self._peak[:n] = peak

    def result(self, num_rows: int) -> Tensor:
        """The weighted mean of the values, `[B, num_rows, D]`: padding rows are cut off."""
        return self._sum[:, :num_rows] / self._total[:, :num_rows]


@dataclass(frozen=True, slots=True)
class _DecodeStep:
    """The next tile of the first n requests of a group; `cuts` lists those that see only columns low to high."""

    index: _TileIndex
    cuts: list[tuple[int, int, int]]  # (request, low, high)


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decodes that share their products, longest first, so that those with tiles left are always a prefix."""

    rows: Tensor  # [n] int64: their query rows
    steps: list[_DecodeStep]


def _attend_decodes(heads: _Heads, q: Tensor, meta: AttentionMetadata, out: Tensor) -> None:
    """One query token a request, `q [R, H, D]`; the j-th product holds the j-th visible tile of every request."""
    num_kv_heads, block_size = heads.kv_cache.shape[2:4]
    head_dim = cached_head_dim(heads.kv_cache)
    size = max(1, _DECODE_GATHER // (CONTEXT_TILE * num_kv_heads * head_dim))

    def plan(meta: AttentionMetadata) -> list[_DecodeGroup]:
        return _plan_decodes(meta, size, block_size, heads.window)

    for group in meta.derived(f"reference.decodes.{size}.{block_size}.{heads.window}", plan):
        state = _OnlineSoftmax(heads.rows(q[group.rows].unsqueeze(1)))
        for step in group.steps:
            keys, values = step.index.read(heads.kv_cache)
            scores = state.scores(heads, keys)
            for r, low, high in step.cuts:
                matrices = slice(r * num_kv_heads, (r + 1) * num_kv_heads)
                for hidden in (slice(0, low), slice(high, CONTEXT_TILE)):
                    scores[matrices, :, hidden] = -torch.inf
                    values[matrices, hidden] = 0  # see _clear
            state.add(heads, scores, values)
        result = state.result(q.shape[1] // num_kv_heads)
        out[group.rows] = result.reshape(len(group.rows), *q.shape[1:]).to(out.dtype)


def _plan_decodes(meta: AttentionMetadata, size: int, block_size: int, window: int) -> list[_DecodeGroup]:
    """Groups of at most `size` decodes with the tiles that each of their products reads."""
    ends = meta.derived("reference.lens", _host_lens)[1][: meta.num_decodes]
    firsts = [_first_tile(end - 1, window) for end in ends]
    counts = [(end - 1) // CONTEXT_TILE + 1 - first for end, first in zip(ends, firsts, strict=True)]
    order = sorted(range(len(ends)), key=lambda r: -counts[r])
    groups = []
    for start in range(0, len(order), size):
        members = order[start : start + size]
        rows = torch.tensor(members, device=meta.block_tables.device)
        tables = meta.block_tables[rows]
        steps = []
        for j in range(counts[members[0]]):
            live = [r for r in members if counts[r] > j]
            tiles = [firsts[r] + j for r in live]
            cuts = [
                (i, *_visible(tile, ends[r] - 1, ends[r] - 1, window))
                for i, (r, tile) in enumerate(zip(live, tiles, strict=True))
            ]
            index = _TileIndex.of(tables[: len(live)], torch.tensor(tiles, device=rows.device), block_size)
            steps.append(_DecodeStep(index, [cut for cut in cuts if cut[1:] != (0, CONTEXT_TILE)]))
        groups.append(_DecodeGroup(rows, steps))
    return groups


def _attend_prefill(heads: _Heads, q: Tensor, block_table: Tensor, end: int, out: Tensor) -> None:
    """The last Q of a request's `end` tokens, `q [Q, H, D]`: tile by tile, each read once for all rows it serves."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, block_size = heads.kv_cache.shape[2:4]
    group = num_heads // num_kv_heads
    size = max(1, _PREFILL_ROWS // group)
    begin = end - num_queries  # position of the first query
    spans = [(a, min(a + size, end)) for a in range(begin, end, size)]  # positions of each product's queries
    states = [_OnlineSoftmax(heads.rows(q[a - begin : b - begin].unsqueeze(0))) for a, b in spans]
    for tile in range(_first_tile(begin, heads.window), (end - 1) // CONTEXT_TILE + 1):
        index = _TileIndex.of(block_table, torch.tensor([tile], device=q.device), block_size)
        keys, values = index.read(heads.kv_cache)
        _clear(keys, values, *_visible(tile, begin, end - 1, heads.window))
        for (a, b), state in zip(spans, states, strict=True):
            if not _first_tile(a, heads.window) <= tile <= (b - 1) // CONTEXT_TILE:
                continue
            scores = state.scores(heads, keys)
            if _visible(tile, b - 1, a, heads.window) != (0, CONTEXT_TILE):  # some query does not see all of it
                mask = _mask(tile, a, b, heads.window, q.device)
                per_query = scores[:, : (b - a) * group].view(num_kv_heads, b - a, group, CONTEXT_TILE)
                per_query.add_(mask[:, None])
            state.add(heads, scores, values)
    for (a, b), state in zip(spans, states, strict=True):
        result = state.result((b - a) * group).view(num_kv_heads, b - a, group, head_dim)
        out[a - begin : b - begin] = result.transpose(0, 1).reshape(b - a, num_heads, head_dim).to(out.dtype)


def _first_tile(position: int, window: int) -> int:
    """The first tile that a query at `position` sees."""
    return max(0, position - window + 1) // CONTEXT_TILE if window else 0


def _visible(tile: int, first: int, last: int, window: int) -> tuple[int, int]:
    """The columns of a tile from what a query at `first` sees at the left to what one at `last` sees at the right."""
    start = tile * CONTEXT_TILE
    low = max(0, first - window + 1 - start) if window else 0
    return min(low, CONTEXT_TILE), min(last + 1 - start, CONTEXT_TILE)


def _mask(tile: int, a: int, b: int, window: int, device: torch.device) -> Tensor:
    """0 where a query at position a..b-1 sees the tile's token, -inf elsewhere: `[b - a, CONTEXT_TILE]`."""
    distance = torch.arange(a, b, device=device)[:, None] - (
        torch.arange(CONTEXT_TILE, device=device) + tile * CONTEXT_TILE
    )
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)


def _clear(keys: Tensor, values: Tensor, low: int, high: int) -> None:
    """Zero a tile outside the columns low to high, which no query of the call sees.

    Their weight is 0 already, but 0 times infinity is not: broken numbers that another request left there, in a
    block that has changed hands, must not get in.
    """
    for tile in (keys, values):
        tile[:, :low] = 0
        tile[:, high:] = 0
