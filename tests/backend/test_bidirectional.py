"""Attention of encoders against the float64 formula, and its bits in any company."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch

from sagellm_backend.reference import encoder_attention

LENGTHS = [1, 7, 130, 64, 1, 33, 300]


def make_qkv(num_heads: int, head_dim: int) -> list[torch.Tensor]:
    """Queries, keys and values as columns of one projection."""
    generator = torch.Generator().manual_seed(num_heads)
    joined = torch.randn(sum(LENGTHS), 3 * num_heads * head_dim, generator=generator)
    return [part.view(len(joined), num_heads, head_dim) for part in joined.chunk(3, dim=-1)]


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) * scale, dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 8), (12, 32), (3, 80), (12, 64)])
def test_each_token_sees_its_whole_text_and_no_other(num_heads: int, head_dim: int) -> None:
    q, k, v = make_qkv(num_heads, head_dim)
    starts = [0, *accumulate(LENGTHS)]
    out = encoder_attention(q, k, v, starts, 0.3)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    for start, end in pairwise(starts):
        expected = formula(q[start:end], k[start:end], v[start:end], 0.3)
        torch.testing.assert_close(out[start:end].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(12, 32), (3, 80), (12, 64)])
def test_a_text_has_the_same_bits_alone(num_heads: int, head_dim: int) -> None:
    q, k, v = make_qkv(num_heads, head_dim)
    starts = [0, *accumulate(LENGTHS)]
    out = encoder_attention(q, k, v, starts, head_dim**-0.5)
    for start, end in pairwise(starts):
        rows = slice(start, end)
        alone = encoder_attention(q[rows], k[rows], v[rows], [0, end - start], head_dim**-0.5)
        assert torch.equal(out[rows], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs(dtype: torch.dtype) -> None:
    q, k, v = (x[:40].to(dtype) for x in make_qkv(4, 16))
    out = encoder_attention(q, k, v, [0, 40], 0.25)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), formula(q, k, v, 0.25), atol=0.02, rtol=0.02)
