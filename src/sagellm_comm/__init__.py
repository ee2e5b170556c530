"""Who talks to whom between the workers of one engine, and how tensors get there.

`Topology` says which ranks form a group, `get_collectives` connects one: `local` (a world of one), or
torch.distributed over gloo, nccl or hccl, all behind `CollectiveOps`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_comm.collectives import CollectiveOps, CollectiveStats, ReduceOp
    from sagellm_comm.local import LocalCollectives
    from sagellm_comm.registry import COLLECTIVE_KINDS, get_collectives
    from sagellm_comm.topology import Coordinates, Topology
    from sagellm_comm.torch_distributed import TorchCollectives
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            ".collectives": ("CollectiveOps", "CollectiveStats", "ReduceOp"),
            ".local": ("LocalCollectives",),
            ".registry": ("COLLECTIVE_KINDS", "get_collectives"),
            ".topology": ("Coordinates", "Topology"),
            ".torch_distributed": ("TorchCollectives",),
        },
    )

__all__ = [
    "COLLECTIVE_KINDS",
    "CollectiveOps",
    "CollectiveStats",
    "Coordinates",
    "LocalCollectives",
    "ReduceOp",
    "Topology",
    "TorchCollectives",
    "get_collectives",
]
