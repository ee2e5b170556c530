"""One of two ranks; started by test_collectives.py with rank, meeting file and what to do."""

from __future__ import annotations

import os
import sys

import torch

from sagellm_comm import get_collectives
from sagellm_protocol import SageLLMError


def work_together(rank: int, meeting: str) -> None:
    comm = get_collectives(world_size=2, rank=rank, init_method=f"file://{meeting}", timeout_s=60)
    mine = torch.tensor([[1.0, 2.0]]) * (rank + 1)
    assert comm.all_reduce(mine.clone()).tolist() == [[3.0, 6.0]]
    assert comm.all_reduce(mine.clone(), "max").tolist() == [[2.0, 4.0]]
    assert comm.all_gather(mine, 0).tolist() == [[1.0, 2.0], [2.0, 4.0]]
    assert comm.all_gather(mine, 1).tolist() == [[1.0, 2.0, 2.0, 4.0]]
    assert comm.broadcast(mine.clone(), 1).tolist() == [[2.0, 4.0]]
    if rank == 0:
        comm.send(mine, 1)
    else:
        assert comm.receive(torch.empty(1, 2), 0).tolist() == [[1.0, 2.0]]
    comm.barrier()
    assert (comm.stats.allreduce_count, comm.stats.allgather_count) == (2, 2)
    assert comm.stats.overhead_ms > 0
    comm.close()


def lose_a_peer(rank: int, meeting: str, mode: str) -> None:
    comm = get_collectives("gloo", world_size=2, rank=rank, init_method=f"file://{meeting}", timeout_s=60)
    if mode == "leave":
        os._exit(0)
    try:
        comm.all_reduce(torch.ones(1))
    except SageLLMError as error:
        print(error.code)
        comm.close()  # gloo's threads must end before the interpreter does, or it aborts on the way out
        return
    raise AssertionError("the peer is gone, but all_reduce succeeded")


if __name__ == "__main__":
    _, own_rank, file, what = sys.argv
    if what == "all":
        work_together(int(own_rank), file)
    else:
        lose_a_peer(int(own_rank), file, what)
