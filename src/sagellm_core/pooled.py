"""Many hidden states as one: the rows of a text pooled step by step, and the vector that its user gets.

A text's chunks may come in any number of steps, cut where the batch had room. What is kept between steps is one row in
float64: `cls` the first row, `last` the last, `max` the largest values, `mean` the sum. Its error is so far below a
float32's last bit that the vector doesn't depend on the cuts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_core.engine_core.output import SchedulerOutput
    from sagellm_core.models.pooling import Pooling, PoolingSpec

__all__ = ["join_pooled", "pool_step", "to_vector"]


def pool_step(output: SchedulerOutput, hidden: Tensor) -> dict[str, Tensor]:
    """The pooled row [H] of this step's tokens of each request that wants one; hidden is [T, H]."""
    return {
        request.request_id: _pool(request.pooling, hidden[start : start + request.num_scheduled_tokens]).cpu()
        for request, start in output.with_starts()
        if request.pooling is not None
    }


def join_pooled(pooling: Pooling, before: Tensor | None, after: Tensor) -> Tensor:
    """The pooled row of a text's first part and of what follows it."""
    if before is None or pooling == "last":
        return after
    if pooling == "cls":
        return before
    return before.maximum(after) if pooling == "max" else before + after


def to_vector(spec: PoolingSpec, pooled: Tensor, num_tokens: int, dimensions: int | None = None) -> list[float]:
    """The vector of a text of `num_tokens` whose rows are `pooled`, in float32; cut before its length is made 1."""
    row = pooled[:dimensions]
    if spec.normalize:
        length = row.norm()  # the number of tokens cancels out
        row = row / length if length > 0 else row
    elif spec.pooling == "mean":
        row = row / num_tokens
    vector: list[float] = row.float().tolist()
    return vector


def _pool(pooling: Pooling, rows: Tensor) -> Tensor:
    if pooling == "cls":
        return rows[0].double()
    if pooling == "last":
        return rows[-1].double()
    return rows.amax(0).double() if pooling == "max" else rows.double().sum(0)
