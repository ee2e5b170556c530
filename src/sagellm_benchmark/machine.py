"""What this machine can do at most: memory reads and multiply-adds a second, as torch reaches them.

A figure of a probe is a lower bound, so `Limits.raised` lifts a limit to whatever a kernel reached in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

Arithmetic = Literal["float32", "bfloat16", "int8"]

_READ_BYTES = 512 << 20  # far more than any cache holds
_MATRIX = 1536
_SECONDS = 0.6  # for each probe; the best of its passes counts


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes read from memory, and operations (a multiply-add is two) of each kind, in a second."""

    read_bytes_per_second: float
    flops_per_second: dict[Arithmetic, float]

    def peak(self, arithmetic: Arithmetic) -> float:
        """Operations a second of that kind."""
        return self.flops_per_second[arithmetic]

    def raised(self, *, read: float = 0.0, arithmetic: Arithmetic = "float32", flops: float = 0.0) -> Limits:
        """With a limit that a kernel has passed lifted to what it reached."""
        peaks = {**self.flops_per_second, arithmetic: max(self.flops_per_second[arithmetic], flops)}
        return replace(self, read_bytes_per_second=max(self.read_bytes_per_second, read), flops_per_second=peaks)

    def to_json(self) -> dict[str, Any]:
        """As a mapping."""
        return {
            "read_bytes_per_second": self.read_bytes_per_second,
            "flops_per_second": dict(self.flops_per_second),
        }


def measure_limits() -> Limits:
    """Probe this machine with as many threads as torch has now; takes about three seconds."""
    return Limits(
        read_bytes_per_second=_read_rate(),
        flops_per_second={"float32": _product_rate(torch.float32), "bfloat16": _bf16_rate(), "int8": _int8_rate()},
    )


def _read_rate() -> float:
    memory = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    return memory.nbytes / _best_seconds(memory.sum)


def _product_rate(dtype: torch.dtype) -> float:
    a, b = (torch.ones(_MATRIX, _MATRIX, dtype=dtype) for _ in range(2))
    return 2 * _MATRIX**3 / _best_seconds(lambda: a @ b)


def _bf16_rate() -> float:
    # Where bf16 has no instructions of its own it is converted and multiplied in float32.
    return max(_product_rate(torch.bfloat16), _product_rate(torch.float32))


def _int8_rate() -> float:
    a, b = (torch.ones(_MATRIX, _MATRIX, dtype=torch.int8) for _ in range(2))
    try:
        return 2 * _MATRIX**3 / _best_seconds(lambda: torch._int_mm(a, b))
    except RuntimeError:  # this build of torch has no such product
        return _product_rate(torch.float32)


def _best_seconds(run: Callable[[], object]) -> float:
    """The shortest pass: the neighbours on the machine can only slow a pass down."""
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while (began := time.perf_counter()) < end:
        run()
        best = min(best, time.perf_counter() - began)
    return best
