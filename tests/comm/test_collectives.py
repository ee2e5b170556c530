"""Collectives: alone, chosen by name, and between two real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

import sagellm_comm
from sagellm_backend import CPUBackendProvider, MockBackendProvider
from sagellm_comm import COLLECTIVE_KINDS, LocalCollectives, TorchCollectives, get_collectives
from sagellm_core import LLMEngineConfig
from sagellm_protocol import CommGroupError, InvalidArgumentError, UnavailableError, UnsupportedError

WORKER = Path(__file__).with_name("gloo_worker.py")


def test_alone_everything_is_the_identity() -> None:
    comm = get_collectives()
    assert isinstance(comm, LocalCollectives)
    tensor = torch.arange(3)
    for result in (comm.all_reduce(tensor, "max"), comm.all_gather(tensor, 0), comm.broadcast(tensor)):
        assert result is tensor
    comm.barrier()
    comm.close()
    assert (comm.rank, comm.world_size, comm.stats.allreduce_count) == (0, 1, 0)


def test_alone_there_is_nobody_to_send_to() -> None:
    comm = get_collectives("local")
    for call in (lambda: comm.send(torch.ones(1), 1), lambda: comm.receive(torch.ones(1), 1)):
        with pytest.raises(CommGroupError, match="is alone"):
            call()
    with pytest.raises(CommGroupError, match="rank must be 0"):
        comm.broadcast(torch.ones(1), 1)


def test_wrong_asks_are_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidArgumentError, match="unknown comm type 'mpi': use one of auto, local, gloo, nccl, hccl"):
        get_collectives("mpi")
    with pytest.raises(CommGroupError, match="world of one, not of 2"):
        get_collectives("local", world_size=2)
    with pytest.raises(InvalidArgumentError, match="needs init_method"):
        get_collectives(world_size=2, provider=CPUBackendProvider(native=False))
    with pytest.raises(UnsupportedError, match="'mock' has no collectives"):
        get_collectives(world_size=2, provider=MockBackendProvider())
    with pytest.raises(CommGroupError, match="rank must be 0 to 1, got 2"):
        TorchCollectives("gloo", rank=2, world_size=2, init_method="file:///nowhere")
    with pytest.raises(UnavailableError, match="no collective backend 'hccl'"):
        TorchCollectives("hccl", rank=0, world_size=2, init_method="file:///nowhere")


def run_workers(tmp_path: Path, *modes: str) -> list[tuple[int, str]]:
    """One process a mode, rank by rank; exit status and output of each."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(tmp_path / "meet"), mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, mode in enumerate(modes)
    ]
    try:
        return [(process.wait(timeout=120), str(process.communicate()[0])) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_two_processes_over_gloo(tmp_path: Path) -> None:
    for status, output in run_workers(tmp_path, "all", "all"):
        assert status == 0, output


@pytest.mark.slow
def test_a_peer_that_dies_or_stays_away_is_an_error_of_the_protocol(tmp_path: Path) -> None:
    (status, output), _ = run_workers(tmp_path, "wait", "leave")
    assert status == 0, output
    assert output.splitlines()[-1] in ("comm_timeout", "distributed_runtime_error")


def test_the_package_exports_what_it_says() -> None:
    assert all(getattr(sagellm_comm, name) is not None for name in sagellm_comm.__all__)
    assert sorted(sagellm_comm.__all__) == sorted(set(sagellm_comm.__all__))


def test_an_engines_configuration_names_the_same_carriers() -> None:
    assert get_args(LLMEngineConfig.model_fields["comm_type"].annotation) == COLLECTIVE_KINDS
    with pytest.raises(InvalidArgumentError, match="comm_type must be 'auto', 'local', 'gloo', 'nccl' or 'hccl'"):
        LLMEngineConfig.model_validate({"model_path": "m", "comm_type": "pigeon"})
