"""The one encoder; every family is an `EncoderSpec` of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sagellm_core.layers.embedding import Embedding
from sagellm_core.layers.encoder_attention import EncoderAttention
from sagellm_core.layers.mlp import MLP, gated_activation, plain_activation
from sagellm_core.layers.norm import LayerNorm
from sagellm_core.layers.rotary import RotaryEmbedding

from .encoder_spec import EncoderSpec
from .weight_packer import WeightPacker

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import OpTable

    from .loader import ParameterReader

__all__ = ["EncoderModel"]


class EncoderLayer:
    """Attention, then feed-forward, each added to its input and normed."""

    __slots__ = ("_attention", "_attention_norm", "_mlp", "_mlp_norm")

    def __init__(
        self, attention: EncoderAttention, mlp: MLP, *, attention_norm: LayerNorm, mlp_norm: LayerNorm
    ) -> None:
        self._attention = attention
        self._mlp = mlp
        self._attention_norm = attention_norm
        self._mlp_norm = mlp_norm

    def __call__(self, x: Tensor, positions: Tensor, starts: Sequence[int]) -> Tensor:
        """x [T, H] -> [T, H]."""
        x, _ = self._attention_norm.add(self._attention(x, positions, starts), x)
        return self._mlp_norm.add(self._mlp(x), x)[0]


class EncoderModel:
    """A loaded encoder: token ids and positions of several texts in, a hidden state of each token out."""

    def __init__(self, spec: EncoderSpec, reader: ParameterReader, ops: OpTable, *, max_model_len: int) -> None:
        self.spec = spec
        self.max_model_len = max_model_len
        self.weight_dtype: torch.dtype = reader.weight_dtype
        packer = WeightPacker(reader, ops)
        table = packer.table("embedding.weight")
        constant = _rows_by_position(spec, packer, max_model_len, reader)
        self._embedding = Embedding(ops, table, constant, 1.0, reader.compute_dtype)
        self._norm = _norm("embedding_norm", spec, packer, ops)
        rotary = None if spec.rope is None else RotaryEmbedding(ops, spec.rope, max_model_len, reader.device)
        self._layers = [_layer(f"layers.{i}.", spec, packer, ops, rotary) for i in range(spec.num_layers)]
        self.weight_bytes = packer.weight_bytes
        self.weight_formats = dict(packer.weight_formats)

    def forward(self, input_ids: Tensor, positions: Tensor, starts: Sequence[int]) -> Tensor:
        """Run one step.

        input_ids [T] int64, positions [T] int64, text r in the rows starts[r] to starts[r + 1], all of it -> hidden
        states [T, H] in the compute dtype.
        """
        x = self._norm(self._embedding(input_ids, positions))
        for layer in self._layers:
            x = layer(x, positions, starts)
        return x


def _rows_by_position(spec: EncoderSpec, packer: WeightPacker, length: int, reader: ParameterReader) -> Tensor:
    """What is added to the word at each position [length, H]: the learned position, and the first type of tokens."""
    rows = torch.zeros(length, spec.hidden_size, device=reader.device)
    if spec.position_rows:
        rows += packer.table("positions.weight")[spec.position_offset : spec.position_offset + length]
    if spec.type_vocab_size:
        rows += packer.table("token_types.weight")[0]
    return rows.to(reader.compute_dtype)


def _layer(
    key: str, spec: EncoderSpec, packer: WeightPacker, ops: OpTable, rotary: RotaryEmbedding | None
) -> EncoderLayer:
    attention = EncoderAttention(
        ops, spec.head_dim, qkv=packer.linear(f"{key}qkv"), o=packer.linear(f"{key}o"), rotary=rotary
    )
    attention_norm = _norm(f"{key}attention_norm", spec, packer, ops)
    up, activate = ("gate_up", gated_activation) if spec.mlp.gated else ("up", plain_activation)
    mlp = MLP(packer.linear(f"{key}{up}"), activate(ops, spec.mlp.activation), packer.linear(f"{key}down"))
    return EncoderLayer(
        attention, mlp, attention_norm=attention_norm, mlp_norm=_norm(f"{key}mlp_norm", spec, packer, ops)
    )


def _norm(key: str, spec: EncoderSpec, packer: WeightPacker, ops: OpTable) -> LayerNorm:
    return LayerNorm(ops, packer.norm_weight(f"{key}.weight"), packer.norm_weight(f"{key}.bias"), spec.eps)
