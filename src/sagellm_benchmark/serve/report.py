"""From what was measured to figures, as plain JSON values.

Latencies are of requests that were answered whole; rates count these, over the time from the first sending to the last
end. *Goodput* counts only requests that met every objective (as DistServe, OSDI '24, defines it).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from sagellm_benchmark.serve.drive import Outcome, Run
from sagellm_benchmark.timing import Summary, percentile
from sagellm_protocol import InvalidArgumentError

_NUM_MESSAGES = 3  # that are kept of each kind of error


@dataclass(frozen=True, slots=True)
class Objectives:
    """What an answer should keep to, in milliseconds; None is no objective."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise InvalidArgumentError(f"the objective {name} must be above 0, got {value:g}", field=name)

    @property
    def is_any(self) -> bool:
        """Whether there is an objective."""
        return any(value is not None for value in asdict(self).values())

    def are_met(self, outcome: Outcome) -> bool:
        """Whether a request was answered in time. An answer of one token has no time per token to miss."""
        if outcome.error is not None:
            return False
        is_single = outcome.num_output_tokens < 2
        return (
            _is_within(outcome.ttft_s, self.ttft_ms)
            and (is_single or _is_within(outcome.tpot_s, self.tpot_ms))
            and _is_within(outcome.latency_s, self.latency_ms)
        )


def _is_within(seconds: float | None, limit_ms: float | None) -> bool:
    return limit_ms is None or (seconds is not None and seconds * 1e3 <= limit_ms)


def describe(run: Run, objectives: Objectives) -> dict[str, Any]:
    """All figures of a run."""
    good = [outcome for outcome in run.outcomes if outcome.error is None]
    seconds = max(run.duration_s, 1e-9)
    num_prompt = sum(outcome.num_prompt_tokens for outcome in good)
    num_output = sum(outcome.num_output_tokens for outcome in good)
    return {
        "num_requests": len(run.outcomes),
        "num_failed": len(run.outcomes) - len(good),
        "errors": _errors(run.outcomes),
        "duration_s": run.duration_s,
        "peak_concurrency": run.peak_concurrency,
        "late_ms_p99": _late_ms(run.outcomes),
        "num_prompt_tokens": num_prompt,
        "num_output_tokens": num_output,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": num_output / seconds,
        "total_tokens_per_second": (num_prompt + num_output) / seconds,
        "ttft_ms": _summary([outcome.ttft_s for outcome in good]),
        "tpot_ms": _summary([outcome.tpot_s for outcome in good]),
        "itl_ms": _summary([b - a for outcome in good for a, b in pairwise(outcome.arrivals)]),
        "latency_ms": _summary([outcome.latency_s for outcome in good]),
        "goodput": _goodput(run, objectives, seconds) if objectives.is_any else None,
    }


def each_request(run: Run) -> list[dict[str, Any]]:
    """One object a request, in the order of their sending; seconds since the run began."""
    return [asdict(outcome) for outcome in run.outcomes]


def _goodput(run: Run, objectives: Objectives, seconds: float) -> dict[str, Any]:
    num_met = sum(map(objectives.are_met, run.outcomes))
    return {
        "objectives": asdict(objectives),
        "requests_per_second": num_met / seconds,
        "attainment": num_met / max(len(run.outcomes), 1),
    }


def _late_ms(outcomes: Sequence[Outcome]) -> float:
    """How far sending was behind its plan: above some milliseconds it is the load generator that is measured."""
    late = sorted(max(0.0, outcome.sent_at - outcome.due_at) for outcome in outcomes)
    return 1e3 * percentile(late, 0.99) if late else 0.0


def _errors(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The kinds of failures, the most frequent first, with the first different messages."""
    kinds: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            kinds.setdefault(outcome.error, []).append(outcome.message)
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return [
        {"kind": kind, "count": len(messages), "messages": list(dict.fromkeys(messages))[:_NUM_MESSAGES]}
        for kind, messages in ordered
    ]


def _summary(seconds: Sequence[float | None]) -> dict[str, float] | None:
    known = [1e3 * value for value in seconds if value is not None]
    if not known:
        return None
    return {**Summary.of(known).to_json(), "std": statistics.pstdev(known)}
