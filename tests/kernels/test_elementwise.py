"""Norms, rotary positions and gated activations: near the reference, the same bits everywhere, each row by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sagellm_backend import reference

if TYPE_CHECKING:
    from sagellm_backend.cpu.native import NativeOps

SIZES = [1, 8, 15, 16, 17, 64, 100, 896]


@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(ops: NativeOps, portable_ops: NativeOps, size: int) -> None:
    x, weight = torch.randn(9, size), torch.randn(size)
    y = ops.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(y, reference.rms_norm(x, weight, 1e-6), rtol=2e-6, atol=2e-6)
    assert torch.equal(y, portable_ops.rms_norm(x, weight, 1e-6))
    assert all(torch.equal(ops.rms_norm(x[i : i + 1], weight, 1e-6)[0], y[i]) for i in range(9))


def test_rms_norm_takes_heads_and_slices(ops: NativeOps) -> None:
    wide, weight = torch.randn(5, 4, 96), torch.randn(32)
    heads = wide[:, :, 32:64]
    torch.testing.assert_close(ops.rms_norm(heads, weight, 1e-5), reference.rms_norm(heads, weight, 1e-5))


@pytest.mark.parametrize("size", SIZES)
def test_add_rms_norm(ops: NativeOps, portable_ops: NativeOps, size: int) -> None:
    x, residual, weight = torch.randn(7, size), torch.randn(7, size), torch.randn(size)
    y, total = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.rms_norm(total, weight, 1e-6))
    assert torch.equal(y, portable_ops.add_rms_norm(x, residual, weight, 1e-6)[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotated"), [(8, 8), (16, 4), (64, 64), (80, 32)])
def test_rotary(ops: NativeOps, portable_ops: NativeOps, head_dim: int, rotated: int, interleaved: bool) -> None:
    q, k = torch.randn(5, 6, head_dim), torch.randn(5, 2, head_dim)
    angles = torch.rand(40, rotated // 2) * 7
    tables = angles.cos(), angles.sin()
    positions = torch.tensor([3, 39, 0, 17, 17])
    expected = reference.rotary(q.clone(), k.clone(), *tables, positions, interleaved)
    results = ops.rotary(q.clone(), k.clone(), *tables, positions, interleaved)
    portable = portable_ops.rotary(q.clone(), k.clone(), *tables, positions, interleaved)
    for result, wanted, same in zip(results, expected, portable, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(result, same)


def test_rotary_turns_slices_of_a_fused_row(ops: NativeOps) -> None:
    fused = torch.randn(4, 3 * 32)
    q, k = fused[:, :64].view(4, 2, 32), fused[:, 64:].view(4, 1, 32)
    angles = torch.rand(8, 16)
    positions = torch.arange(4)
    expected = reference.rotary(q.clone(), k.clone(), angles.cos(), angles.sin(), positions)
    for result, wanted in zip(ops.rotary(q, k, angles.cos(), angles.sin(), positions), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_gated_activations(ops: NativeOps, portable_ops: NativeOps, size: int) -> None:
    x = torch.randn(6, 2 * size) * 4
    for name, options in (("silu_and_mul", ()), ("gelu_and_mul", ("tanh",)), ("gelu_and_mul", ("none",))):
        y = getattr(ops, name)(x, *options)
        # Where 1 + tanh nearly cancels, the result keeps the absolute error of tanh, about 1e-7, times |x|.
        torch.testing.assert_close(y, getattr(reference, name)(x, *options), rtol=2e-6, atol=1e-5)
        assert torch.equal(y, getattr(portable_ops, name)(x, *options))
        assert all(torch.equal(getattr(ops, name)(x[i : i + 1], *options)[0], y[i]) for i in range(6))


def test_activations_at_the_ends_of_the_range(ops: NativeOps) -> None:
    gate = torch.tensor([-1e38, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30, float("nan"), 1e-30])
    x = torch.cat([gate, torch.ones(len(gate))])[None]
    for name, options in (("silu_and_mul", ()), ("gelu_and_mul", ("tanh",))):
        y = getattr(ops, name)(x, *options)[0]
        assert y[8].isnan()
        torch.testing.assert_close(y[:8], gate[:8].clamp(min=0), rtol=1e-6, atol=1e-6)


def test_the_number_of_threads_changes_nothing(ops: NativeOps) -> None:
    x, weight = torch.randn(64, 1024), torch.randn(1024)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((ops.rms_norm(x, weight, 1e-6), ops.silu_and_mul(x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
