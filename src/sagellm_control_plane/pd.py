"""Separation of prefill and decode: which instance computes a long prompt, and which makes its answer.

The rule is conditional: the prompt is computed elsewhere only where the first token comes earlier that way.

    here       T(prefill on the decode instance) + B * a * u    its B decoding requests wait for the u uncached tokens
    elsewhere  T(queue and prefill there) + overhead + u * s    s seconds a token for the hand-over, as measured

A decision is changed only for a gain of a tenth, and while prompts stay, `s` goes back to its first guess: one slow
hand-over must not be the last. Where the hand-over fails for whatever reason, the decode instance
computes the prompt itself: the answer's tokens are the same either way.
"""

from __future__ import annotations

import numpy as np

from sagellm_control_plane.clients.base import PrefixTransfer
from sagellm_control_plane.config import PDSeparationConfig
from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.pool import EnginePool
from sagellm_control_plane.prompts import output_limit, wants_prompt_logprobs
from sagellm_control_plane.routing.base import Rows
from sagellm_control_plane.ticket import Ticket
from sagellm_control_plane.types import ExecutionInstanceType
from sagellm_protocol import Request

_HYSTERESIS = 0.1
_NEWEST_SHARE = 0.2  # of the newest hand-over in the mean
_FADING_SHARE = 0.05  # of a slow measure, with each prompt that stays


class PhaseRouter:
    """Keeps long prompts and short ones apart. Belongs to one event loop."""

    def __init__(self, config: PDSeparationConfig, pool: EnginePool) -> None:
        self._config = config
        self._pool = pool
        self._s_per_token = config.hand_over_s_per_token
        self._was_remote = False

    def narrow(self, ticket: Ticket, rows: Rows) -> Rows:
        """The rows that are meant for such a prompt, or all where there is none."""
        is_long = ticket.routed.num_prompt_tokens >= self._config.prefilling_threshold_input_tokens
        if is_long and not self._can_split(ticket, rows):
            wanted = ExecutionInstanceType.PREFILLING
        else:
            wanted = ExecutionInstanceType.DECODING
        meant = [row for row in rows if self._pool.at(row).instance_type is wanted]
        return np.array(meant, np.intp) if meant else rows

    def source(self, ticket: Ticket, row: int, num_cached_tokens: int) -> tuple[int, int] | None:
        """The row that should compute the prompt for `row`, and the tokens cached there; None: `row` itself."""
        engine = self._pool.at(row)
        num_prompt_tokens = ticket.routed.num_prompt_tokens
        is_long = num_prompt_tokens - num_cached_tokens >= self._config.prefilling_threshold_input_tokens
        if not is_long or engine.instance_type is not ExecutionInstanceType.DECODING:
            return None
        sources = self._sources(ticket) if self._can_receive(ticket, engine) else None
        if sources is None or not len(sources):
            return None
        fleet, predictor = self._pool.fleet, self._pool.predictor
        num_uncached = num_prompt_tokens - num_cached_tokens
        harm_s = fleet.num_decoding[row] * fleet.a[row] * num_uncached
        here_s = float(predictor.ttft_s(np.array([row]), num_prompt_tokens, num_cached_tokens)[0]) + harm_s
        cached = self._cached_tokens(ticket, sources)
        there_s = predictor.ttft_s(sources, num_prompt_tokens, cached)
        best = int(there_s.argmin())
        remote_s = float(there_s[best]) + self._config.hand_over_overhead_s + num_uncached * self._s_per_token
        margin = 1 - _HYSTERESIS if self._was_remote else 1 + _HYSTERESIS
        self._was_remote = here_s > margin * remote_s
        if not self._was_remote:
            excess = max(0.0, self._s_per_token - self._config.hand_over_s_per_token)
            self._s_per_token -= _FADING_SHARE * excess
        return (int(sources[best]), int(cached[best])) if self._was_remote else None

    def measured(self, num_tokens: int, seconds: float) -> None:
        """A hand-over of so many tokens took so long."""
        newest = max(0.0, seconds - self._config.hand_over_overhead_s) / max(1, num_tokens)
        self._s_per_token += _NEWEST_SHARE * (newest - self._s_per_token)

    # ---- steps of the above ---------------------------------------------------------------------------

    def _can_split(self, ticket: Ticket, rows: Rows) -> bool:
        decoding = (self._pool.at(row) for row in rows)
        return any(self._can_receive(ticket, engine) for engine in decoding) and len(self._sources(ticket)) > 0

    def _can_receive(self, ticket: Ticket, engine: ManagedEngine) -> bool:
        return (
            engine.instance_type is ExecutionInstanceType.DECODING
            and isinstance(engine.client, PrefixTransfer)
            and engine.client.config.enable_prefix_caching
            and prompt_token_ids(ticket.request) is not None
            and not wants_prompt_logprobs(ticket.request)  # made with the prompt, on the engine that answers
            and output_limit(ticket.request) != 1
        )

    def _sources(self, ticket: Ticket) -> Rows:
        found = [
            row
            for row in self._pool.free_rows(ticket.destination)
            if self._pool.at(row).instance_type is ExecutionInstanceType.PREFILLING
            and isinstance(self._pool.at(row).client, PrefixTransfer)
        ]
        return np.array(found, np.intp)

    def _cached_tokens(self, ticket: Ticket, rows: Rows) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        routed = ticket.routed
        known = self._pool.routing.prefixes.match(routed.block_hashes, self._pool.fleet.size)[rows]
        return np.minimum(known * routed.block_size, routed.num_prompt_tokens - 1)


def prompt_token_ids(request: Request) -> list[int] | None:
    """The tokens of a prompt where they are known."""
    return request.prompt if isinstance(request.prompt, list) else request.prompt_token_ids
