"""Products with weights in whole numbers: the reference's values, the same to the bit in any company, on any ISA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sagellm_backend import reference
from sagellm_backend.quantized import BITS, QuantizedTensor
from sagellm_protocol import InvalidArgumentError

if TYPE_CHECKING:
    from sagellm_backend.cpu.native import NativeOps

# (bits, group size, minima): all that quantizers and GGUF blocks use, and their mixtures
FORMATS = [
    (bits, group, minima)
    for bits in BITS
    for group in (16, 32, 64, 128, 0)  # 0: one scale a row
    for minima in (False, True)
    if (bits, group) != (5, 16)
]
# (N, K): less than a block of columns, ragged, several blocks and groups
SHAPES = [(1, 1), (5, 7), (16, 32), (33, 40), (80, 600), (50, 1030)]


def quantized(n: int, k: int, bits: int, group: int, *, minima: bool) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    group = group or k
    groups = -(-k // group)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(n, groups, generator=generator) * 0.1 + 0.01).half()
    mins = torch.randn(n, groups, generator=generator).half() if minima else None
    return QuantizedTensor(codes, scales, mins, bits, group)


def rows(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k))


def assert_is_reference(ops: NativeOps, x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> None:
    """Both sides compute the same chain of fused multiply-adds, so that at most roundings of ties differ."""
    expected = reference.linear(x, reference.pack_linear(weight), bias)
    y = ops.linear(x, ops.pack_linear(weight), bias)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("bits", "group", "minima"), FORMATS)
def test_it_is_the_reference_product(ops: NativeOps, bits: int, group: int, minima: bool) -> None:
    for n, k in SHAPES:
        weight = quantized(n, k, bits, group, minima=minima)
        for m in (1, 2, 5, 13):
            assert_is_reference(ops, rows(m, k), weight, torch.linspace(-1, 1, n))


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMATS),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    m=st.integers(1, 40),
    magnitude=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_any_shape(form: tuple[int, int, bool], n: int, k: int, m: int, magnitude: float) -> None:
    native = pytest.importorskip("sagellm_backend.cpu.native")
    portable = native.NativeOps(0)
    weight, x = quantized(n, k, form[0], form[1], minima=form[2]), rows(m, k) * magnitude
    assert_is_reference(native.FASTEST, x, weight)
    y = native.FASTEST.linear(x, native.FASTEST.pack_linear(weight))
    assert torch.equal(y, portable.linear(x, portable.pack_linear(weight)))


@pytest.mark.parametrize(("bits", "group", "minima"), FORMATS)
def test_all_instruction_sets_agree_to_the_bit(
    ops: NativeOps, portable_ops: NativeOps, bits: int, group: int, minima: bool
) -> None:
    for (n, k), m in zip(SHAPES, (3, 1, 12, 2, 25, 7), strict=True):
        weight, x = quantized(n, k, bits, group, minima=minima), rows(m, k)
        y = ops.linear(x, ops.pack_linear(weight))
        assert torch.equal(y, portable_ops.linear(x, portable_ops.pack_linear(weight)))


@pytest.mark.parametrize(("bits", "group", "minima"), [(8, 0, False), (4, 32, False), (4, 64, True), (6, 16, False)])
def test_a_row_is_the_same_in_any_company(ops: NativeOps, bits: int, group: int, minima: bool) -> None:
    counts = (1, 2, 7, 50) if ops.name == "generic" else (*range(1, 71), 253, 300)
    weight, x = quantized(70, 1100, bits, group, minima=minima), rows(300, 1100)
    packed = ops.pack_linear(weight)
    bias = torch.linspace(-2, 2, 70)
    alone = torch.cat([ops.linear(row[None], packed, bias) for row in x])
    for m in counts:
        assert torch.equal(ops.linear(x[:m], packed, bias), alone[:m])
        assert torch.equal(ops.linear(x[-m:], packed, bias), alone[-m:])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 4, 9, 60])
def test_the_number_of_threads_changes_nothing(ops: NativeOps, bits: int, m: int) -> None:
    weight, x = quantized(600, 96, bits, 32, minima=False), rows(m, 96)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(ops.linear(x, ops.pack_linear(weight)))
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_and_codes_may_be_slices_of_wider_ones(ops: NativeOps) -> None:
    whole = quantized(40, 192, 8, 192, minima=False)
    part = QuantizedTensor(whole.codes[:, 64:128], whole.scales, None, 8, 64)
    x = rows(6, 200)[:, 50:114]
    expected = ops.linear(
        x.contiguous(), ops.pack_linear(QuantizedTensor(part.codes.clone(), part.scales, None, 8, 64))
    )
    assert torch.equal(ops.linear(x, ops.pack_linear(part)), expected)


def test_half_precision_rows_give_half_precision(ops: NativeOps) -> None:
    weight, x = quantized(20, 64, 4, 32, minima=False), rows(3, 64).bfloat16()
    y = ops.linear(x, ops.pack_linear(weight))
    assert torch.equal(y, ops.linear(x.float(), ops.pack_linear(weight)).bfloat16())


def test_rows_of_zeros_infinities_and_nans(ops: NativeOps) -> None:
    weight, x = quantized(20, 90, 8, 0, minima=False), rows(5, 90)
    packed = ops.pack_linear(weight)
    clean = ops.linear(x, packed)
    x[1, 3], x[2, 0], x[3] = float("nan"), float("inf"), 0.0
    y = ops.linear(x, packed)
    assert torch.equal(y[[0, 4]], clean[[0, 4]])
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    assert (y[3] == 0).all()
    expected = reference.linear(x, reference.pack_linear(weight))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5, equal_nan=True)


def test_the_longest_sums_fit(ops: NativeOps) -> None:
    weight = QuantizedTensor(torch.full((1, 65536), 255, dtype=torch.uint8), torch.ones(1, 1).half(), None, 8, 65536)
    assert_is_reference(ops, torch.ones(1, 65536), weight)
    with_minimum = QuantizedTensor(weight.codes, weight.scales, torch.ones(1, 1).half(), 8, 65536)
    assert_is_reference(ops, torch.ones(1, 65536), with_minimum)


@pytest.mark.parametrize(("bits", "group", "minima"), FORMATS)
def test_an_embedding_is_the_dequantized_row(ops: NativeOps, bits: int, group: int, minima: bool) -> None:
    weight = quantized(50, 130, bits, group, minima=minima)
    ids = torch.tensor([49, 0, 17, 17])
    expected = weight.dequantize()[ids]
    assert torch.equal(ops.embedding(ids, ops.pack_linear(weight), torch.float32), expected)
    plain = reference.pack_linear(weight)
    assert torch.equal(ops.embedding(ids, plain, torch.float32), expected)
    assert torch.equal(ops.embedding(ids, ops.pack_linear(weight), torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32), (4, 64), (4, 128), (6, 16), (5, 32), (8, 32)])
def test_rounding_and_packing_in_one_go(ops: NativeOps, bits: int, group: int, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        weight = (torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.02).to(dtype)
        weight[n // 2] = 0
        weight[0, : k // 2] *= 1e-6  # scales that are subnormal in half precision, or zero
        size = group or k
        packed = ops.quantize_linear(weight, bits, size).to_buffers()[0]
        expected = ops.pack_linear(QuantizedTensor.round(weight, bits, size)).to_buffers()[0]
        assert packed.keys() == expected.keys()
        assert all(torch.equal(packed[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("bits", "group"), [(8, 96), (4, 32), (4, 24)])
def test_rounding_without_a_kernel(ops: NativeOps, bits: int, group: int) -> None:
    weight, x = torch.randn(20, 96), rows(3, 96)
    expected = reference.linear(x, reference.quantize_linear(weight, bits, group))
    for same in (weight, weight.double(), weight.T.contiguous().T):
        y = ops.linear(x, ops.quantize_linear(same, bits, group))
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)


def test_the_packed_weight_says_what_it_is(ops: NativeOps) -> None:
    packed = ops.pack_linear(quantized(33, 96, 4, 32, minima=True))
    assert (packed.in_features, packed.out_features, packed.dtype) == (96, 33, torch.uint8)
    assert packed.format == "int4/g32+min"
    assert packed.nbytes == 48 * 96 // 2 + 2 * 48 * 3 * 2  # codes; scales and minima
    assert ops.pack_linear(quantized(33, 96, 8, 0, minima=False)).format == "int8"
    assert ops.pack_linear(torch.ones(4, 4, dtype=torch.bfloat16)).format == "bf16"


@pytest.mark.parametrize(("bits", "group", "k"), [(4, 24, 50), (5, 16, 40), (8, 70000, 70000)])
def test_what_no_kernel_reads_goes_to_the_reference(ops: NativeOps, bits: int, group: int, k: int) -> None:
    weight, x = quantized(3, k, bits, group, minima=False), rows(2, k)
    y = ops.linear(x, ops.pack_linear(weight))
    assert torch.equal(y, reference.linear(x, reference.pack_linear(weight)))
    expected = x.double() @ weight.dequantize().double().T
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_a_reference_row_is_the_same_in_any_company() -> None:
    weight, x = reference.pack_linear(quantized(70, 300, 4, 32, minima=True)), rows(40, 300)
    alone = torch.cat([reference.linear(row[None], weight) for row in x])
    for m in (2, 3, 17, 40):
        assert torch.equal(reference.linear(x[:m], weight), alone[:m])


@pytest.mark.parametrize("codes", [torch.zeros(2, 3), torch.zeros(3, dtype=torch.uint8)])
def test_codes_must_be_a_matrix_of_bytes(codes: Tensor) -> None:
    with pytest.raises(InvalidArgumentError):
        QuantizedTensor(codes, torch.ones(2, 1).half(), None, 8, 3)
