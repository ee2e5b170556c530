"""`AttentionMetadata`: what the KV ops must know about one step.

Shapes below use R for scheduled requests and T for scheduled tokens. The KV cache tensor of one layer is
`[2, num_blocks, num_kv_heads, block_size, head_dim]` (0 = K, 1 = V; in an int8 cache the last dimension also holds a
scale, see `KVLayout`); the slot of a token is `block_id * block_size + offset`. Two ops read this metadata, and their
contracts stand in `sagellm_backend.reference`: `reshape_and_cache` writes K and V of the step's tokens to
`slot_mapping`, `paged_attention` lets each token attend to every earlier token of its request, itself included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from sagellm_protocol import BatchType

_Derived = TypeVar("_Derived")


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step as the attention ops see it; all tensors live on the device of the KV cache.

    Requests with exactly one query token stand first (`num_decodes` of them), so that row r of the step's
    tokens belongs to request r for r < num_decodes. Entries of `block_tables` behind a request's last block
    may hold anything: they are never used.
    """

    batch_type: BatchType
    query_start_loc: Tensor  # [R + 1] int32: request r owns token rows query_start_loc[r] .. query_start_loc[r + 1]
    context_lens: Tensor  # [R] int32: tokens visible after this step, the new ones included
    block_tables: Tensor  # [R, max_blocks] int32
    slot_mapping: Tensor  # [T] int64, -1 = do not store
    num_decodes: int
    max_query_len: int
    max_context_len: int
    positions: Tensor  # [T] int64: index of each token in its request
    _derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derived(self, key: str, build: Callable[[AttentionMetadata], _Derived]) -> _Derived:
        """`build(self)`, made at the first call of the step and shared by all later layers.

        This is where a backend keeps its own plan: the metadata is the only object that lives exactly one step.
        """
        if key not in self._derived:
            self._derived[key] = build(self)
        return cast("_Derived", self._derived[key])

    @property
    def num_requests(self) -> int:
        """R."""
        return self.context_lens.shape[0]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.slot_mapping.shape[0]

    @classmethod
    def build(
        cls,
        *,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionMetadata:
        """Metadata from plain numbers, every derived field filled in; what tests, probes and tools use.

        `query_lens[r]` new tokens bring request r to `context_lens[r]` tokens, whose KV lives in the blocks
        `block_tables[r]`. Requests with one query token must stand first.
        """
        starts = [0]
        positions: list[int] = []
        slots: list[int] = []
        for query_len, context_len, table in zip(query_lens, context_lens, block_tables, strict=True):
            starts.append(starts[-1] + query_len)
            for position in range(context_len - query_len, context_len):
                positions.append(position)
                slots.append(table[position // block_size] * block_size + position % block_size)
        width = max((len(table) for table in block_tables), default=0)
        padded = [[*table, *[0] * (width - len(table))] for table in block_tables]
        num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
        return cls(
            batch_type=_batch_type(num_decodes, len(query_lens)),
            query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
            block_tables=torch.tensor(padded, dtype=torch.int32, device=device).reshape(len(query_lens), width),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            num_decodes=num_decodes,
            max_query_len=max(query_lens, default=0),
            max_context_len=max(context_lens, default=0),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
        )


def _batch_type(num_decodes: int, num_requests: int) -> BatchType:
    if num_decodes == num_requests:
        return BatchType.DECODE
    return BatchType.MIXED if num_decodes else BatchType.PREFILL
