from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sagellm_compression import fold_norm_offset, fuse_rows, ungroup_heads
from sagellm_protocol import InvalidArgumentError


def test_fused_rows_give_the_outputs_side_by_side() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(rows, 8) for rows in (6, 2, 2)]
    biases = [torch.randn(rows) for rows in (6, 2, 2)]
    x = torch.randn(4, 8)
    fused = torch.nn.functional.linear(x, fuse_rows(weights), fuse_rows(biases))
    parts = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    torch.testing.assert_close(fused, torch.cat(parts, dim=1))
    assert fuse_rows(weights).is_contiguous()


def test_rows_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"\(2, 8\) torch.float32 with \(2, 4\)"):
        fuse_rows([torch.zeros(2, 8), torch.zeros(2, 4)])
    with pytest.raises(InvalidArgumentError, match=r"bfloat16"):
        fuse_rows([torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bfloat16)])
    with pytest.raises(InvalidArgumentError, match=r"\(2,\)"):
        fuse_rows([torch.zeros(2, 8), torch.zeros(2)])
    with pytest.raises(InvalidArgumentError, match="nothing to fuse"):
        fuse_rows([])


@pytest.mark.parametrize("tail", [(), (5,)])
def test_ungroup_heads_sorts_by_kind(tail: tuple[int, ...]) -> None:
    heads, dim = 3, 2
    kinds = {(kind, head): torch.full((dim, *tail), 10.0 * kind + head) for kind in range(3) for head in range(heads)}
    grouped = torch.cat([kinds[kind, head] for head in range(heads) for kind in range(3)])
    expected = torch.cat([kinds[kind, head] for kind in range(3) for head in range(heads)])
    assert torch.equal(ungroup_heads(grouped, heads, dim), expected)
    with pytest.raises(InvalidArgumentError, match="has 18 rows, not 20"):
        ungroup_heads(torch.zeros(20, *tail), heads, dim)


def test_norm_offset_keeps_the_low_bits() -> None:
    weight = torch.tensor([2**-10, -1.0, 0.5], dtype=torch.bfloat16)
    folded = fold_norm_offset(weight)
    assert folded.dtype == torch.float32
    assert folded.tolist() == [1 + 2**-10, 0.0, 1.5]


def test_the_package_imports_without_torch() -> None:
    code = "import sys, sagellm_compression; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
