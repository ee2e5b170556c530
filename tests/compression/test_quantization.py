"""Quantizers: what they promise about codes, scales and error, and that every name leads to one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_backend import QuantizedTensor, join_rows
from sagellm_compression import METHODS, get_quant_method
from sagellm_protocol import InvalidArgumentError

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 140))


def matrix(shape: tuple[int, int], seed: int, scale: float) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("name", METHODS)
@given(shape=SHAPES, seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 0.02, 1.0, 30.0]))
@settings(max_examples=25, deadline=None)
def test_no_weight_moves_further_than_half_a_step(name: str, shape: tuple[int, int], seed: int, scale: float) -> None:
    weight = matrix(shape, seed, scale)
    quantized = get_quant_method(name).quantize(weight)
    assert quantized.shape == shape
    assert int(quantized.codes.max()) < 1 << quantized.bits
    if quantized.mins is None:
        assert int(quantized.codes.min()) >= 1, "code 0 stays unused: both sides reach as far"
    columns = torch.arange(shape[1]) // quantized.group_size
    steps = quantized.scales.float()[:, columns]
    # Half a step, and what rounding scale (and minimum) to float16, subnormal ones among them, may cut off at the ends.
    slack = steps * 0.5 + weight.abs().amax() * 2**-10 + 2 ** (quantized.bits - 25)
    assert bool(((quantized.dequantize() - weight).abs() <= slack).all())


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_quantized_by_themselves_and_zeros_stay_zeros(name: str) -> None:
    weight = matrix((2100, 96), 0, 0.02)  # more rows than are taken at a time
    weight[7] = 0.0
    method = get_quant_method(name)
    whole, alone = method.quantize(weight), method.quantize(weight[2060:2063])
    assert torch.equal(whole.codes[2060:2063], alone.codes)
    assert torch.equal(whole.scales[2060:2063], alone.scales)
    assert bool((whole.dequantize()[7] == 0).all())
    assert torch.equal(method.quantize(weight.bfloat16()).codes, method.quantize(weight.bfloat16().float()).codes)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown quantization 'int3'.*int8, int4"):
        get_quant_method("int3")


@pytest.mark.parametrize(
    "formats",
    [
        [(4, 32, False), (4, 32, False)],
        [(4, 32, True), (6, 16, False)],
        [(4, 32, False), (8, 32, False), (5, 32, False)],
        [(5, 32, True), (4, 32, False), (6, 16, False)],
    ],
)
def test_joining_formats_changes_no_value(formats: list[tuple[int, int, bool]]) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = []
    for bits, group_size, minima in formats:
        groups = 96 // group_size
        codes = torch.randint(1, 1 << bits, (5, 96), generator=generator, dtype=torch.uint8)
        scales = (torch.rand(5, groups, generator=generator) * 0.01 + 0.001).half()
        mins = (torch.rand(5, groups, generator=generator) * 0.1).half() if minima else None
        parts.append(QuantizedTensor(codes, scales, mins, bits, group_size))
    joined = join_rows(parts)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
