"""Packed linear layers: near the exact product, and one value whatever the company, threads and instruction set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sagellm_backend import reference

if TYPE_CHECKING:
    from sagellm_backend.cpu.native import NativeOps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (N, K): less than a group of columns, ragged, several groups, K over the length that is summed in one go
SHAPES = [(1, 1), (5, 7), (16, 16), (33, 40), (80, 600), (130, 1030)]


def weight_and_rows(n: int, k: int, m: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    return torch.randn(n, k, generator=generator).to(dtype), torch.randn(m, k, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_it_is_the_product(ops: NativeOps, n: int, k: int, dtype: torch.dtype) -> None:
    for m in (1, 2, 3, 4, 5, 6, 7, 13):
        weight, x = weight_and_rows(n, k, m, dtype)
        bias = torch.linspace(-1, 1, n)
        used = x.bfloat16() if dtype is torch.bfloat16 else x
        expected = (used.double() @ weight.double().T + bias.double()).float()
        y = ops.linear(x, ops.pack_linear(weight), bias)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * k**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_all_instruction_sets_agree_to_the_bit(
    ops: NativeOps, portable_ops: NativeOps, n: int, k: int, dtype: torch.dtype
) -> None:
    weight, x = weight_and_rows(n, k, 5, dtype)
    y = ops.linear(x, ops.pack_linear(weight))
    assert torch.equal(y, portable_ops.linear(x, portable_ops.pack_linear(weight)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_any_company(ops: NativeOps, dtype: torch.dtype) -> None:
    rows = (1, 2, 7, 50) if ops.name == "generic" else (*range(1, 20), 31, 48, 49, 64, 253, 300)
    weight, x = weight_and_rows(70, 1100, max(rows), dtype)
    packed = ops.pack_linear(weight)
    bias = torch.linspace(-2, 2, 70)
    alone = torch.cat([ops.linear(row[None], packed, bias) for row in x])
    for m in rows:
        assert torch.equal(ops.linear(x[:m], packed, bias), alone[:m])
        assert torch.equal(ops.linear(x[-m:], packed, bias), alone[-m:])


@pytest.mark.parametrize("m", [1, 4, 9, 60])
def test_the_number_of_threads_changes_nothing(ops: NativeOps, m: int) -> None:
    weight, x = weight_and_rows(600, 96, m)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.linear(x, ops.pack_linear(weight)))
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_may_be_a_slice_of_wider_ones(ops: NativeOps) -> None:
    weight, wide = weight_and_rows(20, 24, 6)[0], torch.randn(6, 60)
    x = wide[:, 10:34]
    packed = ops.pack_linear(weight)
    assert torch.equal(ops.linear(x, packed), ops.linear(x.contiguous(), packed))


def test_the_weight_may_be_a_slice_of_wider_rows(ops: NativeOps) -> None:
    wide = torch.randn(40, 64)
    x = torch.randn(3, 24)
    part = ops.linear(x, ops.pack_linear(wide[:, 8:32]))
    assert torch.equal(part, ops.linear(x, ops.pack_linear(wide[:, 8:32].contiguous())))


def test_the_packed_weight_says_what_it_is(ops: NativeOps) -> None:
    packed = ops.pack_linear(torch.ones(33, 20, dtype=torch.bfloat16))
    assert (packed.in_features, packed.out_features, packed.dtype) == (20, 33, torch.bfloat16)
    assert packed.nbytes == 48 * 32 * 2  # columns come in blocks of sixteen, and so do their entries


def test_what_it_does_not_cover_goes_to_the_reference(ops: NativeOps) -> None:
    weight, x = torch.randn(8, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    y = ops.linear(x, ops.pack_linear(weight))
    assert torch.equal(y, reference.linear(x, reference.pack_linear(weight)))


def test_infinities_and_nans_stay_in_their_rows(ops: NativeOps) -> None:
    weight, x = weight_and_rows(20, 30, 4)
    packed = ops.pack_linear(weight)
    clean = ops.linear(x, packed)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    y = ops.linear(x, packed)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
