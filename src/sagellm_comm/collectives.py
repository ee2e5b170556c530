"""`CollectiveOps`: what a group of workers can do together, whatever carries the bytes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

ReduceOp = Literal["sum", "max", "min"]


@dataclass(slots=True)
class CollectiveStats:
    """What was done so far; the source of the protocol's communication metrics."""

    allreduce_count: int = 0
    allgather_count: int = 0
    overhead_ms: float = 0.0  # time spent inside the calls


class CollectiveOps(ABC):
    """One rank's end of a group. Every rank of the group must make the same calls in the same order.

    Errors: CommTimeoutError if a peer doesn't come in time, DistributedRuntimeError if one is gone.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.stats = CollectiveStats()

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """The elementwise sum (or max, min) over all ranks. Works in place and returns the tensor."""

    @abstractmethod
    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all ranks, which have one shape, joined along `dim` in order of the ranks."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of rank `source`. Works in place and returns the tensor."""

    @abstractmethod
    def send(self, tensor: Tensor, target: int) -> None:
        """Hand a tensor to rank `target`, which must receive it."""

    @abstractmethod
    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Fill `tensor` with what rank `source` sends, and return it."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank is here."""

    def close(self) -> None:
        """Leave the group; nothing may be called afterwards."""
        return

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stats.overhead_ms += (time.perf_counter() - start) * 1e3
