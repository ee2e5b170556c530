"""Norms, activations, rotary, embedding, linear and experts: the float64 formulas, and rows that stand alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sagellm_backend import OpTable, reference
from sagellm_backend.invariance import RowPlan, bmm_rows, linear_rows, row_plan
from sagellm_backend.reference import ReferencePackedLinear
from sagellm_protocol import InvalidArgumentError

CPU = torch.device("cpu")
SHAPES = [(1, 8), (5, 24), (33, 100), (3, 896)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layouts(x: Tensor) -> list[Tensor]:
    """The same values, contiguous and as a column slice of something wider."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), math.nan)
    wide[:, 2:-3] = x
    return [x, wide[:, 2:-3]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_is_the_formula(shape: tuple[int, int]) -> None:
    x, residual, weight = randn(*shape), randn(*shape, seed=1), randn(shape[1], seed=2)
    for values in layouts(x):
        wide = values.double()
        expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        torch.testing.assert_close(reference.rms_norm(values, weight, 1e-5).double(), expected, rtol=1e-5, atol=1e-6)
        y, total = reference.add_rms_norm(values.clone(), residual.clone(), weight, 1e-5)
        assert torch.equal(total, x + residual)
        assert torch.equal(y, reference.rms_norm(total, weight, 1e-5))


def test_norms_of_narrow_inputs_are_float32_inside() -> None:
    x, weight = (randn(4, 64) * 300).half(), torch.ones(64).half()
    expected = x.double() / x.double().pow(2).mean(-1, keepdim=True).sqrt()  # x^2 overflows float16
    for y in (reference.rms_norm(x, weight, 0.0), reference.layer_norm(x, weight, None, 0.0)):
        assert y.dtype == torch.float16
        assert y.isfinite().all()
    torch.testing.assert_close(reference.rms_norm(x, weight, 0.0).double(), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm_is_the_formula(shape: tuple[int, int], with_bias: bool) -> None:
    weight, bias = randn(shape[1], seed=2), randn(shape[1], seed=3) if with_bias else None
    for x in layouts(randn(*shape)):
        wide = x.double()
        centred = wide - wide.mean(-1, keepdim=True)
        expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        expected = expected if bias is None else expected + bias.double()
        torch.testing.assert_close(reference.layer_norm(x, weight, bias, 1e-5).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotated"), [(8, 8), (16, 6), (64, 64)])
def test_rotary_turns_each_pair(head_dim: int, rotated: int, interleaved: bool) -> None:
    positions = torch.tensor([3, 0, 11, 3])
    angles = torch.arange(16)[:, None] * torch.arange(1, rotated // 2 + 1) * 0.1
    q, k = randn(4, 6, head_dim), randn(4, 2, head_dim, seed=1)
    turned = reference.rotary(q.clone(), k.clone(), angles.cos(), angles.sin(), positions, interleaved)
    for before, after in zip((q, k), turned, strict=True):
        expected = before.double()
        for i in range(rotated // 2):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + rotated // 2)
            pair = torch.complex(expected[..., first], expected[..., second])
            pair = pair * torch.exp(1j * angles[positions, i].double())[:, None]
            expected[..., first], expected[..., second] = pair.real, pair.imag
        torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-5)


def test_activations_are_the_formulas() -> None:
    x = randn(7, 2 * 33) * 4
    gate, up = x.double().chunk(2, -1)
    gelu = torch.nn.functional.gelu
    torch.testing.assert_close(
        reference.silu_and_mul(x).double(), gate * torch.sigmoid(gate) * up, rtol=1e-5, atol=1e-5
    )
    for approximate in ("none", "tanh"):
        expected = gelu(gate, approximate=approximate)
        torch.testing.assert_close(reference.gelu_and_mul(x, approximate).double(), expected * up, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reference.gelu(x[:, :33], approximate).double(), expected, rtol=1e-5, atol=1e-5)


def test_activations_of_far_values_are_finite() -> None:
    x = torch.tensor([[-200.0, 200.0, -3e4, 3e4, 1.0, 1.0, 1.0, 1.0]])
    assert reference.silu_and_mul(x).tolist() == [[0.0, 200.0, 0.0, 3e4]]
    assert reference.gelu(x[:, :4], "tanh").tolist() == [[0.0, 200.0, 0.0, 3e4]]


def test_embedding_picks_rows_in_the_dtype_asked_for() -> None:
    weight = randn(10, 4).bfloat16()
    rows = reference.embedding(torch.tensor([3, 0, 3]), weight, torch.float32)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, weight[[3, 0, 3]].float())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 17), (9, 100, 52), (40, 33, 128)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
def test_linear_is_the_product(shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    rows, k, n = shape
    weight, bias = randn(n, k, seed=1).to(dtype), randn(n, seed=2)
    packed = reference.pack_linear(weight)
    assert (packed.in_features, packed.out_features, packed.dtype) == (k, n, dtype)
    assert packed.nbytes == weight.nbytes
    for x in layouts(randn(rows, k)):
        expected = x.double() @ weight.double().T
        scale = {"rtol": tolerance, "atol": tolerance * k**0.5}
        torch.testing.assert_close(reference.linear(x, packed).double(), expected, **scale)
        torch.testing.assert_close(reference.linear(x, packed, bias).double(), expected + bias.double(), **scale)
        assert reference.linear(x, packed).dtype == torch.float32


def test_a_weight_must_be_a_matrix() -> None:
    with pytest.raises(InvalidArgumentError, match="two dimensions"):
        reference.pack_linear(torch.zeros(3))


@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu"])
def test_experts_are_the_weighted_sum(act: str) -> None:
    ops = OpTable.build("cpu", reference_only=True)
    x, gate_up, down = randn(6, 16), randn(5, 24, 16, seed=1), randn(5, 16, 12, seed=2)
    ids = torch.tensor([[0, 3], [4, 0], [3, 4], [1, 0], [0, 1], [3, 1]])
    weights = torch.softmax(randn(6, 2, seed=3), -1)
    got = ops.moe_experts(
        x, ids, weights, [ops.pack_linear(w) for w in gate_up], [ops.pack_linear(w) for w in down], act
    )
    functional = torch.nn.functional
    activation: Callable[[Tensor], Tensor] = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
    }[act]
    for row in range(6):
        expected = torch.zeros(16, dtype=torch.float64)
        for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
            gate, up = (gate_up[expert].double() @ x[row].double()).chunk(2)
            expected += weight * (down[expert].double() @ (activation(gate) * up))
        torch.testing.assert_close(got[row].double(), expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_activation_of_experts_is_refused() -> None:
    ops = OpTable.build("cpu", reference_only=True)
    packed = [ops.pack_linear(randn(4, 4))]
    with pytest.raises(InvalidArgumentError, match="relu"):
        ops.moe_experts(randn(1, 4), torch.tensor([[0]]), torch.ones(1, 1), packed, packed, "relu")


def row_ops() -> dict[str, Callable[[Tensor], Tensor]]:
    """Every row-wise op as a function of x [T, 64] alone."""
    weight = randn(64, seed=5)
    angles = randn(1, 8, seed=6)
    ops = OpTable.build("cpu", reference_only=True)
    linears = {dtype: ops.pack_linear(randn(40, 64, seed=7).to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    experts = (
        [ops.pack_linear(randn(64, 64, seed=8 + i)) for i in range(3)],
        [ops.pack_linear(randn(64, 32, seed=11 + i)) for i in range(3)],
    )

    def rotary(x: Tensor) -> Tensor:
        heads = x.clone().view(-1, 4, 16)
        return ops.rotary(heads, heads[:, :2], angles.cos(), angles.sin(), torch.zeros(len(x), dtype=torch.long))[0]

    def moe(x: Tensor) -> Tensor:
        scores, ids = x[:, :3].topk(2)
        return ops.moe_experts(x, ids, scores.softmax(-1), *experts)

    return {
        "rms_norm": lambda x: ops.rms_norm(x, weight, 1e-6),
        "head_rms_norm": lambda x: ops.rms_norm(x.view(-1, 4, 16), weight[:16], 1e-6),
        "layer_norm": lambda x: ops.layer_norm(x, weight, weight, 1e-6),
        "silu_and_mul": lambda x: ops.silu_and_mul(x[:, :58].contiguous()),
        "gelu_and_mul": lambda x: ops.gelu_and_mul(x, "tanh"),
        "gelu": lambda x: ops.gelu(x[:, :61].contiguous(), "tanh"),  # 61: no multiple of a vector register
        "rotary": rotary,
        "linear_fp32": lambda x: ops.linear(x, linears[torch.float32], weight[:40]),
        "linear_bf16": lambda x: ops.linear(x, linears[torch.bfloat16]),
        "moe": moe,
    }


ROW_OPS = row_ops()


@pytest.mark.parametrize("name", sorted(ROW_OPS))
@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(0, 699), min_size=1, max_size=40), start=st.integers(0, 699))
def test_no_bit_of_a_row_depends_on_the_other_rows(name: str, rows: list[int], start: int) -> None:
    op, x = ROW_OPS[name], randn(700, 64)
    everything = op(x)
    assert torch.equal(op(x[rows]), everything[rows])
    for count in (1, 2, 3, 5, 6, 7, 100):  # where libraries change their ways
        assert torch.equal(op(x[start : start + count]), everything[start : start + count]), count


@pytest.mark.parametrize("plan", [RowPlan(1, True), RowPlan(4, True), RowPlan(8, False)], ids=str)
def test_every_plan_computes_the_product(plan: RowPlan) -> None:
    x, weight = randn(13, 32), randn(20, 32, seed=1)
    torch.testing.assert_close(linear_rows(x, weight, plan), x @ weight.T)
    a, b = plan.pad(randn(3, 13, 32)), randn(3, 32, 20, seed=1)
    assert a.shape[1] == plan.padded(13)
    torch.testing.assert_close(bmm_rows(a, b, plan), a @ b)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_probed_plan_holds_for_shapes_it_was_not_probed_with(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plan = row_plan("linear", torch.float32, CPU)
        for k, n in ((24, 17), (100, 52), (320, 64), (688, 256)):
            x, weight = randn(150, k), randn(n, k, seed=1)
            everything = linear_rows(x, weight, plan)
            for count in (1, 2, 3, 5, 7, 12, 31, 100):
                assert torch.equal(linear_rows(x[7 : 7 + count], weight, plan), everything[7 : 7 + count])
    finally:
        torch.set_num_threads(before)


def test_the_packed_weight_says_what_it_is() -> None:
    packed = ReferencePackedLinear(torch.zeros(3, 5))
    assert repr(packed) == "ReferencePackedLinear(in=5, out=3, format=f32)"
