"""How long the engines of a fleet would take to a first token: the one formula that routes and predicts."""

from __future__ import annotations

from types import EllipsisType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagellm_control_plane.fleet import Fleet

Seconds = NDArray[np.float64]


def first_token_s(
    fleet: Fleet,
    num_prompt_tokens: float,
    num_uncached_tokens: NDArray[Any],
    rows: NDArray[np.intp] | EllipsisType = ...,
) -> tuple[Seconds, Seconds]:
    """Seconds that the prefill of a request takes on each engine, and until its first token if it went there now.

    The latter is prefills ahead of it and its own, in steps that carry what decodes there. `num_uncached_tokens` has
    one figure for each of `rows`, by default all of the fleet: whole columns are not copied. Both are the caller's own.
    """
    a, q, queued = fleet.a[rows], fleet.q[rows], fleet.queued_tokens[rows]

    # Over a thousand engines an array more costs as much as the sum in it, so sums are made in place.
    work = num_uncached_tokens * -0.5
    work += num_prompt_tokens
    work *= q
    work += a
    work *= num_uncached_tokens

    step_s = fleet.k[rows] * fleet.kv_tokens[rows]
    step_s += fleet.b[rows] * fleet.num_decoding[rows]
    step_s += fleet.c0[rows]

    own = queued + num_uncached_tokens
    own /= fleet.max_num_batched_tokens[rows]
    np.ceil(own, out=own)  # steps
    own *= step_s
    own += a * queued
    own += q * fleet.queued_attention[rows]
    own += work
    return work, own
