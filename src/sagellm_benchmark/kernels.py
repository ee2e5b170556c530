"""`sage-llm bench kernels`: every op of the op table, beside this machine's limits and the torch reference.

The chosen implementation and the reference take turns in one run, so that noise of the machine meets both. The time of
a case is the median of its calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sagellm_backend import OpTable, get_provider
from sagellm_benchmark.kernel_cases import (
    DEFAULT_FORMATS,
    DEFAULT_ROWS,
    Call,
    KernelCase,
    KernelGroup,
    build_groups,
)
from sagellm_benchmark.machine import Limits, measure_limits
from sagellm_benchmark.shapes import find_shape
from sagellm_protocol import InvalidArgumentError

_TURNS = 3
_LEAST_CALLS = 1  # of one turn, however long they take


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """What to measure, with which op tables."""

    groups: tuple[KernelGroup, ...]
    ops: OpTable
    reference: OpTable
    num_threads: int
    shape: str

    @property
    def cases(self) -> list[KernelCase]:
        """All cases of all groups."""
        return [case for group in self.groups for case in group.cases]


@dataclass(frozen=True, slots=True)
class KernelResult:
    """Seconds of a call, of the chosen implementation and of the reference (None: not asked for, or the same)."""

    case: KernelCase
    source: str
    seconds: float
    reference_seconds: float | None

    @property
    def bytes_per_second(self) -> float:
        """Of the bytes that must be moved."""
        return self.case.nbytes / self.seconds

    @property
    def flops_per_second(self) -> float:
        """A multiply-add is two."""
        return self.case.flops / self.seconds

    @property
    def speedup(self) -> float | None:
        """How many times as long the reference takes."""
        return None if self.reference_seconds is None else self.reference_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class KernelReport:
    """All results, and the limits they stand beside."""

    shape: str
    num_threads: int
    limits: Limits
    results: list[KernelResult]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "benchmark": "kernels",
            "shape": self.shape,
            "num_threads": self.num_threads,
            "limits": self.limits.to_json(),
            "results": [
                {
                    **asdict(result.case),
                    "source": result.source,
                    "seconds": result.seconds,
                    "reference_seconds": result.reference_seconds,
                    "bytes_per_second": result.bytes_per_second,
                    "flops_per_second": result.flops_per_second,
                }
                for result in self.results
            ],
        }


def plan_kernels(
    shape: str,
    *,
    ops: Sequence[str] | None = None,
    formats: Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
    num_threads: int | None = None,
) -> KernelPlan:
    """Choose cases: ops (None: all), formats of weights, rows of activations.

    `shape` is a name of `shapes.SHAPES` or a model. Raises `InvalidArgumentError` for what does not exist.
    """
    provider = get_provider("cpu")
    if any(m < 1 for m in rows or ()):
        raise InvalidArgumentError("rows must be at least 1", field="rows")
    groups = tuple(build_groups(find_shape(shape), formats or DEFAULT_FORMATS, sorted(set(rows or DEFAULT_ROWS))))
    known = list(dict.fromkeys(group.op for group in groups))
    unknown = sorted(set(ops or ()) - set(known))
    if unknown:
        raise InvalidArgumentError(f"no op {unknown[0]!r} is measured: use {', '.join(known)}", field="ops")
    return KernelPlan(
        groups=tuple(group for group in groups if group.cases and (not ops or group.op in ops)),
        ops=provider.ops,
        reference=get_provider("cpu", native=False).ops,
        num_threads=num_threads or torch.get_num_threads(),
        shape=shape,
    )


def measure_kernels(
    plan: KernelPlan,
    *,
    seconds: float = 0.3,
    reference: bool = True,
    on_case: Callable[[str], None] | None = None,
    limits: Limits | None = None,
) -> KernelReport:
    """Run the plan; each implementation of a case for about `seconds`. torch keeps the plan's number of threads.

    `limits` are measured first unless given.
    """
    torch.set_num_threads(plan.num_threads)
    limits = limits or measure_limits(plan.ops)
    results = []
    sources = plan.ops.explain()
    with torch.inference_mode():
        for group in plan.groups:
            source = sources[group.op]
            tables = [plan.ops]
            if reference and source != "reference":
                tables.append(plan.reference)
            bound = [group.bind(table) for table in tables]
            for case, *calls in zip(group.cases, *bound, strict=True):
                ours, *others = time_in_turns(calls, seconds)
                result = KernelResult(case, source, ours, others[0] if others else None)
                limits = _raise_limits(limits, result)
                results.append(result)
                if on_case is not None:
                    on_case(f"{case.op}: {case.label}")
    return KernelReport(plan.shape, plan.num_threads, limits, results)


def time_in_turns(calls: Sequence[Call], seconds: float) -> list[float]:
    """Median seconds of a call of each, over a few turns of each that last about `seconds` together."""
    durations: list[list[float]] = [[] for _ in calls]
    numbers = [0] * len(calls)
    for call in calls:
        call(0)
    for _ in range(_TURNS):
        for index, call in enumerate(calls):
            end = time.perf_counter() + seconds / _TURNS
            least = len(durations[index]) + _LEAST_CALLS
            while (began := time.perf_counter()) < end or len(durations[index]) < least:
                numbers[index] += 1
                call(numbers[index])
                durations[index].append(time.perf_counter() - began)
    return [statistics.median(each) for each in durations]


def _raise_limits(limits: Limits, result: KernelResult) -> Limits:
    """What a kernel reaches the machine can do. Of reads only linear layers tell: other operands may lie in a cache."""
    read = result.bytes_per_second if result.case.op == "linear" else 0.0
    return limits.raised(read=read, arithmetic=result.case.arithmetic, flops=result.flops_per_second)
