"""Why a request went where it went, and when: kept for the last requests in a bounded ring."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagellm_control_plane.routing import Choice
from sagellm_control_plane.routing.base import Rows

_MAX_CANDIDATES = 8


class Candidates:
    """The scores that a choice was made by. They are written out only when somebody asks."""

    __slots__ = ("_names", "_rows", "_scores")

    def __init__(
        self, choice: Choice, scores: Mapping[str, NDArray[Any]], rows: Rows, names: Mapping[int, str]
    ) -> None:
        """`names` are the engines of all rows; a mapping that nobody changes any more."""
        self._names = names
        self._scores = scores
        self._rows = rows
        if len(rows) > _MAX_CANDIDATES:
            self._keep_the_best(choice)

    def scores(self) -> dict[str, dict[str, float]]:
        """The scores of the best candidates, by engine; lower is better, by the first figure."""
        return {
            self._names[int(row)]: {name: float(values[place]) for name, values in self._scores.items()}
            for place, row in enumerate(self._rows)
        }

    def _keep_the_best(self, choice: Choice) -> None:
        first = next(iter(self._scores.values()))
        best = np.argpartition(first, _MAX_CANDIDATES)[:_MAX_CANDIDATES]
        best = best[np.argsort(first[best], kind="stable")]
        chosen = int(np.flatnonzero(self._rows == choice.row)[0])
        if chosen not in best:
            best[-1] = chosen
        self._rows = self._rows[best]
        self._scores = {name: values[best] for name, values in self._scores.items()}


@dataclass(slots=True)
class StayTrace:
    """One stay of a request on an engine. Times are seconds of the control plane's clock."""

    engine_id: str
    granted_at: float
    choice: Choice
    num_candidates: int
    candidates: Candidates | None = None  # None: it was made without scores
    first_token_at: float | None = None
    ended_at: float | None = None
    num_output_tokens: int = 0
    prefilled_by: str | None = None  # the engine that computed the prompt for this one
    hand_over_s: float | None = None
    left_because: str | None = None  # None: the answer was complete, or its reader went away

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        ttft_s = None if self.first_token_at is None else self.first_token_at - self.granted_at
        predicted_s = self.choice.predicted_ttft_s
        decode_s = None if self.first_token_at is None or self.ended_at is None else self.ended_at - self.first_token_at
        return {
            "engine_id": self.engine_id,
            "granted_at": self.granted_at,
            "rule": self.choice.rule,
            "num_candidates": self.num_candidates,
            "num_cached_tokens": int(self.choice.num_cached_tokens),
            "predicted_ttft_s": None if predicted_s is None else float(predicted_s),
            "ttft_s": ttft_s,
            "decode_s": decode_s,
            "num_output_tokens": self.num_output_tokens,
            "scores": {} if self.candidates is None else self.candidates.scores(),
            "prefilled_by": self.prefilled_by,
            "hand_over_s": self.hand_over_s,
            "left_because": self.left_because,
        }


@dataclass(slots=True)
class RequestTrace:
    """The way of one request through the control plane. Times are seconds of its clock, None: not yet, or never."""

    request_id: str
    model: str
    tenant: str | None
    priority: int
    policy: str
    router: str
    queued_at: float
    num_prompt_tokens: int
    num_waiting: int  # others in the queue when it came
    stays: list[StayTrace] = field(default_factory=list)  # more than one: it was moved
    first_token_at: float | None = None
    ended_at: float | None = None
    outcome: str = "running"  # then the finish reason, an error's code, or `cancelled`
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first token."""
        return None if self.first_token_at is None else self.first_token_at - self.queued_at

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        granted_at = self.stays[0].granted_at if self.stays else None
        return {
            "request_id": self.request_id,
            "model": self.model,
            "tenant": self.tenant,
            "priority": self.priority,
            "policy": self.policy,
            "router": self.router,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_waiting": self.num_waiting,
            "queued_at": self.queued_at,
            "granted_at": granted_at,
            "first_token_at": self.first_token_at,
            "ended_at": self.ended_at,
            "queue_s": None if granted_at is None else granted_at - self.queued_at,
            "ttft_s": self.ttft_s,
            "latency_s": None if self.ended_at is None else self.ended_at - self.queued_at,
            "outcome": self.outcome,
            "error": self.error,
            "stays": [stay.to_dict() for stay in self.stays],
        }


class TraceRing:
    """The traces of the last `capacity` requests that came; of two with the same id the later one."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._traces: OrderedDict[str, RequestTrace] = OrderedDict()

    def __len__(self) -> int:
        return len(self._traces)

    def add(self, trace: RequestTrace) -> None:
        """Keep a trace that goes on growing; the oldest goes."""
        self._traces[trace.request_id] = trace
        self._traces.move_to_end(trace.request_id)
        if len(self._traces) > self._capacity:
            self._traces.popitem(last=False)

    def get(self, request_id: str) -> RequestTrace | None:
        """The trace of a request; None where it was never seen or is forgotten."""
        return self._traces.get(request_id)

    def recent(self, limit: int) -> list[RequestTrace]:
        """The last that came, newest first."""
        traces = reversed(self._traces.values())
        return [trace for trace, _ in zip(traces, range(limit), strict=False)]
