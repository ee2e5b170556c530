"""Row invariance of matrix products: found by a probe, kept by padding.

A request's tokens must not depend on who else is in the batch, so every row of `x @ w` must come out bit for
bit the same whatever the number of rows. BLAS libraries do not promise that: they pick another kernel, with
another order of summation, for few rows, for odd remainders, for other thread counts. In practice the results
agree as soon as the number of rows is a multiple of the kernel's own tile. `row_plan` finds that tile by trying
(once per process for each product, dtype, device and thread count); callers pad their rows up to it.

Where no multiple helps, the plan is `fixed`: products are made of calls with exactly `tile` rows. In the
worst case the tile is 1, each row is a call of its own, and the law holds by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

# Keys are read in tiles of this many tokens, at fixed places of the context: attention sums in one fixed order.
CONTEXT_TILE = 256
_CANDIDATES = (1, 4, 8, 16, 32, 64)
# Row counts that reach a library's special cases: single rows, odd remainders, thread splits, large blocks.
_MULTIPLES = (1, 2, 3, 4, 5, 6, 7, 9, 16, 33)
_MAX_ROWS = 640
_LINEAR_SHAPES = ((16, 48), (64, 40), (64, 64), (256, 688), (896, 160), (2048, 32), (2048, 72))  # (K, N)
_HEAD_DIMS = (16, 64, 80, 128)

Product = Literal["linear", "attention"]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """How many rows a matrix product must have for each row's result to be independent of the others."""

    tile: int
    fixed: bool  # False: any multiple of `tile` rows in one call; True: exactly `tile` rows a call

    def padded(self, num_rows: int) -> int:
        """The smallest allowed number of rows that holds `num_rows`."""
        return -(-num_rows // self.tile) * self.tile

    def pad(self, rows: Tensor) -> Tensor:
        """`rows [..., M, K]` with zero rows appended up to the tile; the tensor itself if it fits already."""
        missing = self.padded(rows.shape[-2]) - rows.shape[-2]
        return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def linear_rows(x: Tensor, weight: Tensor, plan: RowPlan) -> Tensor:
    """`x [M, K] @ weight [N, K]^T -> [M, N]`, each row independent of the others."""
    num_rows = x.shape[0]
    padded = plan.pad(x)
    if not plan.fixed:
        y = torch.nn.functional.linear(padded, weight)
    else:
        y = torch.cat([torch.nn.functional.linear(tile, weight) for tile in torch.split(padded, plan.tile)])
    return y if y.shape[0] == num_rows else y[:num_rows]


def bmm_rows(a: Tensor, b: Tensor, plan: RowPlan) -> Tensor:
    """`a [B, M, K] @ b [B, K, N] -> [B, M, N]`; M must already be padded to the plan."""
    if not plan.fixed:
        return torch.bmm(a, b)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for i in range(a.shape[0]):
        for row in range(0, a.shape[1], plan.tile):
            rows = slice(row, row + plan.tile)
            torch.bmm(a[i : i + 1, rows], b[i : i + 1], out=out[i : i + 1, rows])
    return out


def row_plan(product: Product, dtype: torch.dtype, device: torch.device) -> RowPlan:
    """The plan for a kind of product; probed at the first call, then remembered.

    A change of torch's thread count asks for a new probe, because libraries split rows over threads.
    """
    return _probe(product, dtype, str(device), torch.get_num_threads())


@lru_cache(maxsize=64)
def _probe(product: Product, dtype: torch.dtype, device: str, num_threads: int) -> RowPlan:
    del num_threads  # part of the key only
    generator = torch.Generator().manual_seed(0)
    make = _linear_cases if product == "linear" else _attention_cases
    with torch.inference_mode():
        cases = make(lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype))
        for fixed in (False, True):
            for tile in _CANDIDATES:
                plan = RowPlan(tile, fixed)
                if all(_is_invariant(case, plan) for case in cases):
                    return plan
    return RowPlan(1, fixed=True)


@dataclass(frozen=True, slots=True)
class _Case:
    """Products that must all give the same row for the same row of `rows`."""

    rows: Tensor
    products: tuple[Callable[[Tensor, RowPlan], Tensor], ...]


def _is_invariant(case: _Case, plan: RowPlan) -> bool:
    """Whether single rows keep their bits over row counts, row positions and the case's products."""
    available = case.rows.shape[0] // plan.tile * plan.tile
    expected = case.products[0](case.rows[:available], plan)
    for multiple in _MULTIPLES:
        count = multiple * plan.tile
        # Sums in another order differ in few results once these are rounded to 16 bits: the likeliest, a single tile,
        # is tried at many places.
        for start in range(0, available, 3) if multiple == 1 else (0, 13):
            if start + count > available:
                continue
            rows = case.rows[start : start + count].clone()
            if not all(torch.equal(f(rows, plan), expected[start : start + count]) for f in case.products):
                return False
    return True


def _linear_cases(randn: Callable[..., Tensor]) -> list[_Case]:
    def product(weight: Tensor) -> Callable[[Tensor, RowPlan], Tensor]:
        return lambda x, plan: linear_rows(x, weight, plan)

    return [_Case(randn(_MAX_ROWS, k), (product(randn(n, k)),)) for k, n in _LINEAR_SHAPES]


def _attention_cases(randn: Callable[..., Tensor]) -> list[_Case]:
    """Both products of attention (queries with keys transposed, weights with values), alone and in a batch."""

    def product(b: Tensor, batch: int) -> Callable[[Tensor, RowPlan], Tensor]:
        return lambda a, plan: bmm_rows(plan.pad(a).repeat(batch, 1, 1), b.expand(batch, -1, -1), plan)[-1]

    cases = []
    for head_dim in _HEAD_DIMS:
        keys = randn(1, CONTEXT_TILE, head_dim)
        for rows, b in (
            (randn(_MAX_ROWS // 2, head_dim), keys.transpose(1, 2)),
            (randn(_MAX_ROWS // 2, CONTEXT_TILE).abs(), keys),
        ):
            cases.append(_Case(rows, (product(b, 1), product(b, 6))))
    return cases
