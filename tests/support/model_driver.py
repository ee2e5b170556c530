"""Runs a model without an engine: block tables and attention metadata for a handful of requests, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sagellm_backend.attention import AttentionMetadata
from sagellm_backend.kv import KVLayout

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import BackendProvider
    from sagellm_core.models import CausalLM

__all__ = ["ModelDriver", "prompt_logits"]


class ModelDriver:
    """A model with a KV cache and requests that are named by their number.

    Every request owns `blocks_per_request` blocks, dealt out interleaved so that no request's blocks are neighbours.
    """

    def __init__(
        self,
        model: CausalLM,
        provider: BackendProvider,
        *,
        num_requests: int = 1,
        block_size: int = 16,
        blocks_per_request: int = 8,
    ) -> None:
        spec = model.spec
        layout = KVLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, block_size, torch.float32)
        self.model = model
        self.block_size = block_size
        self.kv_caches = provider.allocate_kv_cache(layout, num_requests * blocks_per_request)
        self.tables = [
            [block * num_requests + request for block in range(blocks_per_request)] for request in range(num_requests)
        ]
        self.num_computed = [0] * num_requests

    def step(self, scheduled: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Compute the next tokens of some requests, (request, token ids) each; hidden states [T, H].

        Requests with a single token must stand first, as in the engine.
        """
        for request, token_ids in scheduled:
            self.num_computed[request] += len(token_ids)
        meta = AttentionMetadata.build(
            query_lens=[len(token_ids) for _, token_ids in scheduled],
            context_lens=[self.num_computed[request] for request, _ in scheduled],
            block_tables=[self.tables[request] for request, _ in scheduled],
            block_size=self.block_size,
        )
        input_ids = torch.tensor([token for _, token_ids in scheduled for token in token_ids])
        with torch.inference_mode():
            return self.model.forward(input_ids, meta.positions, self.kv_caches, meta)

    def logits(self, scheduled: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """As `step`, but the logits [T, vocab] of every token."""
        hidden = self.step(scheduled)
        with torch.inference_mode():
            return self.model.compute_logits(hidden)


def prompt_logits(
    model: CausalLM, provider: BackendProvider, token_ids: Sequence[int], *, blocks_per_request: int = 8
) -> Tensor:
    """Logits [T, vocab] of one prompt of up to 16 * blocks_per_request tokens, computed in one step."""
    return ModelDriver(model, provider, blocks_per_request=blocks_per_request).logits([(0, token_ids)])
