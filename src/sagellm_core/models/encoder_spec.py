"""What one encoder is, as frozen data: a transformer whose tokens see the whole text, and that makes no text.

Encoders of the BERT line (Devlin et al., NAACL 2019) share one form, in which norms follow the additions:

    x = norm(words + positions + type);  h = norm(x + attention(x));  y = norm(h + mlp(h))
"""

from __future__ import annotations

from dataclasses import dataclass

from .spec import MLPSpec, RopeSpec

__all__ = ["EncoderSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """The whole model; sizes in elements, `max_position_embeddings` in tokens (what positions can reach).

    Positions are learned (`rope` is None) or rotary. The table of learned ones begins `position_offset` rows late.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp: MLPSpec
    eps: float
    max_position_embeddings: int
    position_offset: int = 0
    type_vocab_size: int = 0
    rope: RopeSpec | None = None
    attention_bias: bool = True

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def position_rows(self) -> int:
        """Rows of the position table, 0 where there is none."""
        return 0 if self.rope is not None else self.position_offset + self.max_position_embeddings

    @property
    def num_parameters(self) -> int:
        """Number of parameters in matrices; norms and biases are left out."""
        width = self.hidden_size
        mlp = (3 if self.mlp.gated else 2) * self.mlp.intermediate_size
        tables = self.vocab_size + self.position_rows + self.type_vocab_size
        return width * (tables + self.num_layers * (4 * width + mlp))
