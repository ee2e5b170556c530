"""The one decoder-only transformer; every family is a `DecoderSpec` of it.

Layers pass on two tensors: `x`, the last block's output, not yet added, and `residual`, the stream. The next norm adds
the one to the other and normalises in a single op. Everything a step needs comes in as arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_backend.ops import PackedLinear
from sagellm_core.layers.attention import Attention
from sagellm_core.layers.embedding import Embedding, LMHead
from sagellm_core.layers.linear import Linear
from sagellm_core.layers.mlp import MLP, gated_activation, plain_activation
from sagellm_core.layers.moe import MoE
from sagellm_core.layers.norm import LayerNorm, NoNorm, Norm, RMSNorm
from sagellm_core.layers.rotary import RotaryEmbedding

from .spec import DecoderSpec, LayerSpec, MoESpec, RopeSpec
from .weight_packer import WeightPacker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sagellm_backend import AttentionMetadata, OpTable

    from .loader import ParameterReader
    from .packed_cache import PackedCache

__all__ = ["CausalLM", "DecoderLayer", "ParallelLayer"]


class DecoderLayer:
    """Attention, then feed-forward, each normed before, after or both, and added to the residual stream."""

    __slots__ = ("_attention", "_attention_norm", "_mlp", "_mlp_norm", "_post_attention_norm", "_post_mlp_norm")

    def __init__(
        self,
        attention: Attention,
        mlp: MLP | MoE,
        *,
        attention_norm: Norm,
        mlp_norm: Norm,
        post_attention_norm: Norm | None,
        post_mlp_norm: Norm | None,
    ) -> None:
        self._attention = attention
        self._mlp = mlp
        self._attention_norm = attention_norm
        self._mlp_norm = mlp_norm
        self._post_attention_norm = post_attention_norm
        self._post_mlp_norm = post_mlp_norm

    def __call__(
        self, x: Tensor, residual: Tensor | None, positions: Tensor, kv_cache: Tensor, meta: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        """x [T, H] and the stream [T, H] (None in the first layer: x is the stream) -> the same after this layer."""
        if residual is None:
            x, residual = self._attention_norm(x), x
        else:
            x, residual = self._attention_norm.add(x, residual)
        x = self._attention(x, positions, kv_cache, meta)
        if self._post_attention_norm is not None:
            x = self._post_attention_norm(x)
        x, residual = self._mlp_norm.add(x, residual)
        x = self._mlp(x)
        if self._post_mlp_norm is not None:
            x = self._post_mlp_norm(x)
        return x, residual


class ParallelLayer:
    """Attention and feed-forward side by side on the same stream (GPT-NeoX)."""

    __slots__ = ("_attention", "_attention_norm", "_mlp", "_mlp_norm")

    def __init__(self, attention: Attention, mlp: MLP | MoE, *, attention_norm: Norm, mlp_norm: Norm) -> None:
        self._attention = attention
        self._mlp = mlp
        self._attention_norm = attention_norm
        self._mlp_norm = mlp_norm

    def __call__(
        self, x: Tensor, residual: Tensor | None, positions: Tensor, kv_cache: Tensor, meta: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        """As `DecoderLayer`."""
        if residual is None:
            normed, residual = self._attention_norm(x), x
        else:
            normed, residual = self._attention_norm.add(x, residual)
        attended = self._attention(normed, positions, kv_cache, meta)
        return self._mlp(self._mlp_norm(residual)) + attended, residual


class CausalLM:
    """A loaded model: token ids and positions in, hidden states and logits out."""

    def __init__(
        self,
        spec: DecoderSpec,
        reader: ParameterReader,
        ops: OpTable,
        *,
        max_model_len: int,
        cache: PackedCache | None = None,
    ) -> None:
        self.spec = spec
        self.max_model_len = max_model_len
        self.weight_dtype: torch.dtype = reader.weight_dtype
        build = _Builder(spec, reader, ops, max_model_len, cache)
        table = build.embedding_table()
        self._embedding = build.embedding(table)
        self._layers = [build.layer(index, layer) for index, layer in enumerate(spec.layers)]
        self._final_norm = build.norm("final_norm")
        self._lm_head = build.lm_head(table)
        self.weight_bytes = build.weight_bytes
        self.weight_formats = dict(build.weight_formats)

    def forward(self, input_ids: Tensor, positions: Tensor, kv_caches: list[Tensor], meta: AttentionMetadata) -> Tensor:
        """Run one step.

        input_ids [T] int64, positions [T] int64, one cache a layer ([2, blocks, kv_heads, block_size, head_dim], which
        receives this step's keys and values) -> hidden states [T, H] after the final norm, in the compute dtype.
        """
        x = self._embedding(input_ids, positions)
        residual: Tensor | None = None
        for layer, kv_cache in zip(self._layers, kv_caches, strict=True):
            x, residual = layer(x, residual, positions, kv_cache, meta)
        assert residual is not None, "a decoder has at least one layer"
        return self._final_norm.add(x, residual)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, H] -> logits [R, vocab] in float32, scaled and capped as the model wants."""
        return self._lm_head(hidden)


class _Builder(WeightPacker):
    """Makes layers out of parameters."""

    def __init__(
        self, spec: DecoderSpec, reader: ParameterReader, ops: OpTable, max_model_len: int, cache: PackedCache | None
    ) -> None:
        super().__init__(reader, ops, cache)
        self._spec = spec
        self._max_model_len = max_model_len
        self._rotaries: dict[RopeSpec, RotaryEmbedding] = {}

    def embedding_table(self) -> Tensor | PackedLinear:
        """The rows of tokens: packed where they are the LM head too, so that they lie in memory once."""
        if self._spec.tie_word_embeddings:
            return self.packed("embedding.weight")
        return self.table("embedding.weight")

    def embedding(self, table: Tensor | PackedLinear) -> Embedding:
        spec = self._spec
        positions = self.table("positions.weight") if spec.learned_positions else None
        return Embedding(self._ops, table, positions, spec.embedding_scale, self._reader.compute_dtype)

    def lm_head(self, table: Tensor | PackedLinear) -> LMHead:
        spec = self._spec
        packed = table if isinstance(table, PackedLinear) else self.packed("lm_head.weight")
        linear = Linear(self._ops, packed, self._reader.bias("lm_head.bias"))
        return LMHead(self._ops, linear, spec.logit_scale, spec.logit_soft_cap)

    def layer(self, index: int, layer: LayerSpec) -> DecoderLayer | ParallelLayer:
        key, placement = f"layers.{index}.", self._spec.norm_placement
        attention, mlp = self._attention(key, layer), self._mlp(key, layer)
        before, after = placement != "post", placement != "pre"
        attention_norm = self.norm(f"{key}attention_norm") if before else NoNorm()
        mlp_norm = self.norm(f"{key}mlp_norm") if before else NoNorm()
        if self._spec.parallel_residual:
            return ParallelLayer(attention, mlp, attention_norm=attention_norm, mlp_norm=mlp_norm)
        return DecoderLayer(
            attention,
            mlp,
            attention_norm=attention_norm,
            mlp_norm=mlp_norm,
            post_attention_norm=self.norm(f"{key}post_attention_norm") if after else None,
            post_mlp_norm=self.norm(f"{key}post_mlp_norm") if after else None,
        )

    def norm(self, key: str) -> RMSNorm | LayerNorm:
        spec = self._spec.norm
        weight = self.norm_weight(f"{key}.weight")
        if spec.kind == "rms":
            return RMSNorm(self._ops, weight, spec.eps)
        return LayerNorm(self._ops, weight, self.norm_weight(f"{key}.bias"), spec.eps)

    def _attention(self, key: str, layer: LayerSpec) -> Attention:
        spec = self._spec
        has_norm = spec.qk_norm != "none"
        q_norm, k_norm = (
            RMSNorm(self._ops, self.norm_weight(f"{key}{name}.weight"), spec.norm.eps) if has_norm else None
            for name in ("q_norm", "k_norm")
        )
        return Attention(
            self._ops,
            spec,
            layer,
            qkv=self.linear(f"{key}qkv"),
            o=self.linear(f"{key}o"),
            q_norm=q_norm,
            k_norm=k_norm,
            rotary=None if layer.rope is None else self._rotary(layer.rope),
        )

    def _mlp(self, key: str, layer: LayerSpec) -> MLP | MoE:
        mlp, ops = layer.mlp, self._ops
        if isinstance(mlp, MoESpec):
            gate_up, down = (
                [self.packed(f"{key}experts.{e}.{name}.weight") for e in range(mlp.num_experts)]
                for name in ("gate_up", "down")
            )
            # Rounding the router would send tokens to other experts: it is small and stays as it is.
            router = Linear(ops, self.exact(f"{key}router.weight"))
            return MoE(ops, mlp, router, gate_up, down)
        if mlp.gated:
            return MLP(self.linear(f"{key}gate_up"), gated_activation(ops, mlp.activation), self.linear(f"{key}down"))
        return MLP(self.linear(f"{key}up"), plain_activation(ops, mlp.activation), self.linear(f"{key}down"))

    def _rotary(self, spec: RopeSpec) -> RotaryEmbedding:
        if spec not in self._rotaries:
            self._rotaries[spec] = RotaryEmbedding(self._ops, spec, self._max_model_len, self._reader.device)
        return self._rotaries[spec]
