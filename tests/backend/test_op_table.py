"""The op table: who is chosen, who is not, and what it says about it."""

from __future__ import annotations

import pytest
import torch

from sagellm_backend import OPS, OpRegistry, OpTable
from sagellm_backend.ops import ANY_KIND, OP_NAMES, OpImplementation
from sagellm_protocol import InternalError, InvalidArgumentError, UnsupportedError


def registry() -> OpRegistry:
    """A private copy of the reference ops."""
    copy = OpRegistry()
    for name in OP_NAMES:
        item = next(item for item in OPS.implementations(name) if item.source == "reference")
        register = copy.register(name, kind=ANY_KIND, priority=0, source="reference", composite=item.composite)
        register(item.function)
    return copy


def test_every_op_has_a_reference_that_serves_every_kind() -> None:
    table = OpTable.build("some new chip", reference_only=True)
    assert table.explain() == dict.fromkeys(sorted(OP_NAMES), "reference")
    assert OPS.names() >= sorted(OP_NAMES)


def test_the_best_implementation_whose_needs_are_met_is_chosen() -> None:
    ops = registry()
    ops.register("gelu", kind="cpu", priority=10, requires=("avx2",), source="avx2")(lambda x: x)
    ops.register("gelu", kind="cpu", priority=20, requires=("avx2", "avx512f"), source="avx512")(lambda x: x)
    ops.register("gelu", kind="cuda", priority=99, source="cuda")(lambda x: x)

    def chosen(kind: str, *features: str) -> str:
        return OpTable.build(kind, features=features, registry=ops).explain()["gelu"]

    assert chosen("cpu") == "reference"
    assert chosen("cpu", "avx2") == "avx2"
    assert chosen("cpu", "avx512f", "avx2") == "avx512"
    assert chosen("cuda") == "cuda"
    assert chosen("ascend") == "reference"
    assert [item.source for item in ops.implementations("gelu", "cpu")] == ["avx512", "avx2", "reference"]
    assert [item.source for item in ops.implementations("gelu")] == ["cuda", "avx512", "avx2", "reference"]


def test_among_equals_the_later_wins_and_the_same_source_is_replaced() -> None:
    ops = registry()
    ops.register("gelu", kind="cpu", source="first")(lambda x: 1)
    ops.register("gelu", kind="cpu", source="second")(lambda x: 2)
    assert OpTable.build("cpu", registry=ops).explain()["gelu"] == "second"
    ops.register("gelu", kind="cpu", source="second")(lambda x: 3)
    assert len(ops.implementations("gelu")) == 3
    assert OpTable.build("cpu", registry=ops).gelu(torch.zeros(1)) == 3


def test_an_implementation_can_be_forced() -> None:
    ops = registry()
    ops.register("gelu", kind="cpu", source="fast")(lambda x: x)
    table = OpTable.build("cpu", prefer={"gelu": "reference"}, registry=ops)
    assert table.explain()["gelu"] == "reference"
    assert OpTable.build("cpu", reference_only=True, registry=ops).explain()["gelu"] == "reference"
    with pytest.raises(
        InvalidArgumentError, match="'gelu' has no usable implementation 'slow'; usable: fast, reference"
    ):
        OpTable.build("cpu", prefer={"gelu": "slow"}, registry=ops)


def test_forcing_an_op_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="gleu"):
        OpTable.build("cpu", prefer={"gleu": "reference"})


def test_composite_ops_follow_the_tables_choice() -> None:
    ops = registry()
    ops.register("silu_and_mul", kind="cpu", source="zero")(lambda x: torch.zeros_like(x[:, : x.shape[1] // 2]))
    table = OpTable.build("cpu", registry=ops)
    gate_up, down = [table.pack_linear(torch.ones(4, 2))], [table.pack_linear(torch.ones(2, 2))]
    ids, weights = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    assert not table.moe_experts(torch.ones(3, 2), ids, weights, gate_up, down).any()


def test_ops_beyond_the_vocabulary_are_reached_by_name() -> None:
    ops = registry()
    ops.register("fancy", kind="cpu")(lambda x: x + 1)
    table = OpTable.build("cpu", registry=ops)
    assert table.get("fancy")(1) == 2
    assert table.get("gelu") is table.gelu
    assert table.explain()["fancy"] == __name__  # the module, where no source is given
    with pytest.raises(UnsupportedError, match=r"'cuda' has no op 'fancy'; it has add_rms_norm, "):
        OpTable.build("cuda", registry=ops).get("fancy")


def test_a_table_with_holes_is_refused() -> None:
    item = OpImplementation("gelu", "cpu", "x", lambda x: x)
    with pytest.raises(InternalError, match="no implementation of add_rms_norm, copy_blocks"):
        OpTable("cpu", {"gelu": item})
