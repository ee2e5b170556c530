"""Routing: which engine a request goes to, among those that have a place free. One function and one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sagellm_control_plane.config import PDSeparationConfig
from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.types import ExecutionInstanceType
from sagellm_protocol import InvalidArgumentError

Router = Callable[[Sequence[ManagedEngine]], ManagedEngine]
"""Chooses one of the candidates (never empty); the same candidates in the same state give the same choice."""


def round_robin(candidates: Sequence[ManagedEngine]) -> ManagedEngine:
    """One after the other: the one whose last request lies furthest back."""
    return min(candidates, key=lambda engine: (engine.last_grant, engine.engine_id))


def least_loaded(candidates: Sequence[ManagedEngine]) -> ManagedEngine:
    """Fewest requests in flight."""
    return min(candidates, key=lambda engine: (engine.num_requests, engine.last_grant, engine.engine_id))


def adaptive(candidates: Sequence[ManagedEngine]) -> ManagedEngine:
    """Least work in flight, counted in tokens: a long prompt weighs more than a short one."""
    return min(
        candidates, key=lambda engine: (engine.num_tokens, engine.num_requests, engine.last_grant, engine.engine_id)
    )


ROUTERS: dict[str, Router] = {"adaptive": adaptive, "least_loaded": least_loaded, "round_robin": round_robin}


def get_router(name: str) -> Router:
    """The router registered as `name`; `InvalidArgumentError` for an unknown one."""
    if name not in ROUTERS:
        raise InvalidArgumentError(
            f"unknown routing_policy {name!r}; choose one of {', '.join(ROUTERS)}", field="routing_policy"
        )
    return ROUTERS[name]


def prefer_by_phase(
    candidates: Sequence[ManagedEngine], num_prompt_tokens: int, config: PDSeparationConfig
) -> Sequence[ManagedEngine]:
    """The candidates meant for a prompt of this length, or all where there is none."""
    is_long = num_prompt_tokens >= config.prefilling_threshold_input_tokens
    wanted = ExecutionInstanceType.PREFILLING if is_long else ExecutionInstanceType.DECODING
    return [engine for engine in candidates if engine.instance_type is wanted] or candidates
