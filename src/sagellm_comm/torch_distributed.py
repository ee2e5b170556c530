"""`TorchCollectives`: torch.distributed behind the common interface (gloo, nccl, hccl)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from sagellm_comm.collectives import CollectiveOps, ReduceOp
from sagellm_protocol import CommGroupError, CommTimeoutError, DistributedRuntimeError, UnavailableError

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class TorchCollectives(CollectiveOps):
    """This process's end of torch.distributed's world, which a process can join once.

    Args:
        backend: "gloo", "nccl" or "hccl".
        rank, world_size: this process's place.
        init_method: where the ranks meet: "tcp://host:port" of rank 0, or "file:///path" that all see.
        timeout_s: how long a call waits for the other ranks.

    Raises:
        UnavailableError: this torch has no such backend.
        CommTimeoutError: the other ranks didn't come.
    """

    def __init__(self, backend: str, *, rank: int, world_size: int, init_method: str, timeout_s: float = 300.0) -> None:
        super().__init__(rank, world_size)
        if not 0 <= rank < world_size:
            raise CommGroupError(f"rank must be 0 to {world_size - 1}, got {rank}", rank=rank)
        if not (dist.is_available() and dist.is_backend_available(backend)):
            raise UnavailableError(f"this torch has no collective backend {backend!r}; gloo works on every CPU")
        with _errors(f"joining rank {rank} of {world_size} at {init_method}"):
            dist.init_process_group(
                backend,
                init_method=init_method,
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
            )

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """The elementwise sum (or max, min) over all ranks, in place."""
        self.stats.allreduce_count += 1
        with self._timed(), _errors("all_reduce"):
            dist.all_reduce(tensor, _REDUCE[op])
        return tensor

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all ranks, joined along `dim` in order of the ranks."""
        self.stats.allgather_count += 1
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with self._timed(), _errors("all_gather"):
            dist.all_gather(parts, tensor)
        return torch.cat(parts, dim)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of rank `source`, in place."""
        self._check(source)
        with self._timed(), _errors("broadcast"):
            dist.broadcast(tensor, source)
        return tensor

    def send(self, tensor: Tensor, target: int) -> None:
        """Hand a tensor to rank `target`."""
        self._check_peer(target)
        with self._timed(), _errors("send"):
            dist.send(tensor.contiguous(), target)

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Fill `tensor` with what rank `source` sends."""
        self._check_peer(source)
        with self._timed(), _errors("receive"):
            dist.recv(tensor, source)
        return tensor

    def barrier(self) -> None:
        """Wait until every rank is here."""
        with self._timed(), _errors("barrier"):
            dist.barrier()

    def close(self) -> None:
        """Leave the world."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise CommGroupError(f"rank must be 0 to {self.world_size - 1}, got {rank}", rank=rank)

    def _check_peer(self, rank: int) -> None:
        self._check(rank)
        if rank == self.rank:
            raise CommGroupError(f"rank {rank} can't send to itself", rank=rank)


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """torch's errors as the protocol's."""
    try:
        yield
    except RuntimeError as error:  # DistError and its kin are RuntimeErrors
        message = " ".join(str(error).split())
        if "timeout" in message.lower() or "timed out" in message.lower():
            raise CommTimeoutError(f"{what}: the other ranks did not answer in time: {message}") from error
        raise DistributedRuntimeError(f"{what} failed: {message}") from error
