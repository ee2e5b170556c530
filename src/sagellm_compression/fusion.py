"""Weight-time fusions: rewrites of a checkpoint's weights, done once at load, that leave the model's outputs alone.

Only rewrites that are exact are here: each output element of the fused operation is the same sum in the same order
as before, so golden tokens do not move. (Folding a norm's weight into the next projection is not: it rounds anew.)
The engine's own loader makes the same rewrites while it reads a file, without a second copy; these are for weights
that are in memory already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sagellm_protocol import InvalidArgumentError


def fuse_rows(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack projections of one input into one: q, k, v or gate, up; one pass over the input instead of several.

    Args:
        weights: [N_i, K] matrices, or [N_i] biases, in the order in which the outputs are to stand.

    Returns:
        [sum(N_i), K], or [sum(N_i)]; contiguous, a copy. Split the output with `torch.split`.
    """
    if not weights:
        raise InvalidArgumentError("nothing to fuse: pass at least one weight", field="weights")
    first = weights[0]
    for weight in weights[1:]:
        if weight.shape[1:] != first.shape[1:] or weight.ndim != first.ndim or weight.dtype != first.dtype:
            raise InvalidArgumentError(
                f"cannot fuse {tuple(first.shape)} {first.dtype} with {tuple(weight.shape)} {weight.dtype}: all must "
                "have one input size and one dtype; check the checkpoint's shapes against its config.json",
                field="weights",
            )
    return torch.cat(list(weights), dim=0)


def ungroup_heads(weight: torch.Tensor, num_heads: int, head_dim: int) -> torch.Tensor:
    """Reorder a fused q, k, v projection stored head by head (GPT-NeoX) to all q, then all k, then all v.

    Args:
        weight: [num_heads * 3 * head_dim, K] or, for a bias, [num_heads * 3 * head_dim].

    Returns:
        The same rows as [3 * num_heads * head_dim, ...]; contiguous.
    """
    if weight.shape[0] != num_heads * 3 * head_dim:
        raise InvalidArgumentError(
            f"a fused q, k, v weight of {num_heads} heads of {head_dim} has {num_heads * 3 * head_dim} rows, "
            f"not {weight.shape[0]}; check num_attention_heads and hidden_size in config.json",
            field="weight",
        )
    rest = weight.shape[1:]
    return weight.reshape(num_heads, 3, head_dim, *rest).transpose(0, 1).reshape(weight.shape).contiguous()


def fold_norm_offset(weight: torch.Tensor) -> torch.Tensor:
    """The scale of a Gemma norm, stored as its difference from one: 1 + weight, as a plain RMSNorm weight.

    Args:
        weight: [H], any floating dtype.

    Returns:
        [H] float32, whatever the checkpoint's dtype: the model adds in float32, and bfloat16 would lose the low bits.
    """
    return weight.float() + 1.0
