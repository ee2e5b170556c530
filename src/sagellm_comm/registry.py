"""`get_collectives`: connect this rank to its group by the name of the carrier."""

from __future__ import annotations

from sagellm_backend import BackendProvider
from sagellm_comm.collectives import CollectiveOps
from sagellm_comm.local import LocalCollectives
from sagellm_comm.torch_distributed import TorchCollectives
from sagellm_protocol import CommGroupError, InvalidArgumentError, UnsupportedError

COLLECTIVE_KINDS = ("auto", "local", "gloo", "nccl", "hccl")


def get_collectives(
    kind: str = "auto",
    *,
    provider: BackendProvider | None = None,
    rank: int = 0,
    world_size: int = 1,
    init_method: str | None = None,
    timeout_s: float = 300.0,
) -> CollectiveOps:
    """This rank's end of a group of `world_size` ranks that meet at `init_method`.

    "auto" is `local` for a world of one, else what belongs to the provider's device (gloo without a provider).

    Raises:
        InvalidArgumentError: no such kind, or a world of several without `init_method`.
        CommGroupError: `local` for several ranks.
        UnsupportedError: the provider's device has no collectives.
    """
    if kind not in COLLECTIVE_KINDS:
        raise InvalidArgumentError(
            f"unknown comm type {kind!r}: use one of {', '.join(COLLECTIVE_KINDS)}", field="kind"
        )
    if kind == "auto":
        kind = "local" if world_size == 1 else _carrier_of(provider)
    if kind == "local":
        if world_size != 1:
            raise CommGroupError(f"comm type local is a world of one, not of {world_size}; use auto or gloo")
        return LocalCollectives()
    if init_method is None:
        raise InvalidArgumentError(
            f"comm type {kind} needs init_method, where the ranks meet, e.g. tcp://127.0.0.1:29500", field="init_method"
        )
    return TorchCollectives(kind, rank=rank, world_size=world_size, init_method=init_method, timeout_s=timeout_s)


def _carrier_of(provider: BackendProvider | None) -> str:
    if provider is None:
        return "gloo"
    if provider.collective_backend is None or not provider.capability().has_collective:
        raise UnsupportedError(f"backend {provider.kind!r} has no collectives: run it with one worker")
    return provider.collective_backend
