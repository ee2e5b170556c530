"""A world of one: every collective is the identity."""

from __future__ import annotations

from torch import Tensor

from sagellm_comm.collectives import CollectiveOps, ReduceOp
from sagellm_protocol import CommGroupError


class LocalCollectives(CollectiveOps):
    """The only rank of its group. Counts no operations, because nothing travels."""

    def __init__(self) -> None:
        super().__init__(rank=0, world_size=1)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """The tensor itself."""
        del op
        return tensor

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The tensor itself."""
        del dim
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor itself."""
        self._check(source)
        return tensor

    def send(self, tensor: Tensor, target: int) -> None:
        """Always an error: a rank that sends to itself would wait for itself."""
        del tensor
        raise CommGroupError(f"rank 0 is alone and can't send to rank {target}")

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Always an error, as `send`."""
        del tensor
        raise CommGroupError(f"rank 0 is alone and can't receive from rank {source}")

    def barrier(self) -> None:
        """Return at once."""

    def _check(self, rank: int) -> None:
        if rank != 0:
            raise CommGroupError(f"rank must be 0 in a world of one, got {rank}", rank=rank)
