"""Self-attention over the paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .linear import Linear
from .norm import RMSNorm
from .rotary import RotaryEmbedding

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import AttentionMetadata, OpTable
    from sagellm_core.models.spec import DecoderSpec, LayerSpec

__all__ = ["Attention"]


class Attention:
    """Project to queries, keys and values, place them, write keys and values to the cache, attend, project back."""

    __slots__ = (
        "_attend",
        "_cache",
        "_head_dim",
        "_k_norm",
        "_norm_heads",
        "_o",
        "_q_norm",
        "_qkv",
        "_rotary",
        "_scale",
        "_sizes",
        "_soft_cap",
        "_window",
    )

    def __init__(
        self,
        ops: OpTable,
        spec: DecoderSpec,
        layer: LayerSpec,
        *,
        qkv: Linear,
        o: Linear,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        rotary: RotaryEmbedding | None,
    ) -> None:
        self._cache = ops.reshape_and_cache
        self._attend = ops.paged_attention
        self._qkv = qkv
        self._o = o
        self._q_norm = q_norm
        self._k_norm = k_norm
        self._norm_heads = spec.qk_norm == "head"
        self._rotary = rotary
        self._sizes = (spec.q_size, spec.kv_size, spec.kv_size)
        self._head_dim = spec.head_dim
        self._scale = layer.attention_scale
        self._window = layer.sliding_window
        self._soft_cap = spec.attention_soft_cap

    def __call__(self, x: Tensor, positions: Tensor, kv_cache: Tensor, meta: AttentionMetadata) -> Tensor:
        """x [T, H], positions [T] -> [T, H]; writes this step's keys and values to `kv_cache`."""
        num_tokens, head_dim = x.shape[0], self._head_dim
        q, k, v = self._qkv(x).split_with_sizes(self._sizes, dim=-1)
        if self._q_norm is not None and self._k_norm is not None and not self._norm_heads:
            q, k = self._q_norm(q), self._k_norm(k)
        q = q.view(num_tokens, -1, head_dim)
        k = k.view(num_tokens, -1, head_dim)
        if self._q_norm is not None and self._k_norm is not None and self._norm_heads:
            q, k = self._q_norm(q), self._k_norm(k)
        if self._rotary is not None:
            q, k = self._rotary(q, k, positions)
        self._cache(k, v.view(num_tokens, -1, head_dim), kv_cache, meta.slot_mapping)
        attended = self._attend(q, kv_cache, meta, self._scale, sliding_window=self._window, soft_cap=self._soft_cap)
        return self._o(attended.view(num_tokens, -1))
