"""What this machine can do at most: memory reads and multiply-adds a second, as torch or our own kernels reach them.

A figure of a probe is a lower bound, so `Limits.raised` lifts a limit to whatever a kernel reached in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sagellm_backend import QuantizedTensor

if TYPE_CHECKING:
    from sagellm_backend import OpTable

Arithmetic = Literal["float32", "bfloat16", "int8"]

_READ_BYTES = 512 << 20  # far more than any cache holds
_LARGE = 1536  # of a matrix for torch's own products
_SMALL = 512  # of one that stays in the cache
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


def measure_limits(ops: OpTable) -> Limits:
    """Probe this machine with as many threads as torch has now; takes about five seconds."""
    return Limits(
        read_bytes_per_second=_read_rate(),
        flops_per_second={
            "float32": max(_torch_rate(torch.float32), _linear_rate(ops, torch.randn(_SMALL, _SMALL))),
            "bfloat16": max(_torch_rate(torch.bfloat16), _linear_rate(ops, torch.randn(_SMALL, _SMALL).bfloat16())),
            "int8": max(
                _torch_int8_rate(), _linear_rate(ops, QuantizedTensor.round(torch.randn(_SMALL, _SMALL), 8, _SMALL))
            ),
        },
    )


def _read_rate() -> float:
    memory = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    return memory.nbytes / _best_seconds(memory.sum)


def _linear_rate(ops: OpTable, weight: Tensor | QuantizedTensor) -> float:
    """Of the backend's own `linear` where weights and rows stay in the cache: what its instructions can do."""
    packed, x = ops.pack_linear(weight), torch.randn(_SMALL, _SMALL)
    return 2 * _SMALL**3 / _best_seconds(lambda: ops.linear(x, packed))


def _torch_rate(dtype: torch.dtype) -> float:
    a, b = (torch.ones(_LARGE, _LARGE, dtype=dtype) for _ in range(2))
    return 2 * _LARGE**3 / _best_seconds(lambda: a @ b)


def _torch_int8_rate() -> float:
    a, b = (torch.ones(_LARGE, _LARGE, dtype=torch.int8) for _ in range(2))
    try:
        return 2 * _LARGE**3 / _best_seconds(lambda: torch._int_mm(a, b))
    except RuntimeError:  # this build of torch has no such product
        return 0.0


def _best_seconds(run: Callable[[], object]) -> float:
    """The shortest pass: the neighbours on the machine can only slow a pass down."""
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while (began := time.perf_counter()) < end:
        run()
        best = min(best, time.perf_counter() - began)
    return best
