"""What one decoder-only transformer is, as frozen data.

A `DecoderSpec` says everything that `decoder.py` must know to build and run a model; a family file
(`llama.py`, `gemma2.py`, ...) makes one from a configuration. Nothing here imports torch, so that a specification can
be read, printed and sized in milliseconds.

A layer computes, with `norm` the norms that its `NormPlacement` asks for:

    pre       h = x + attention(norm(x));            y = h + mlp(norm(h))
    post      h = x + norm(attention(x));            y = h + norm(mlp(h))
    sandwich  h = x + norm(attention(norm(x)));      y = h + norm(mlp(norm(h)))
    parallel  y = x + attention(norm(x)) + mlp(norm(x))      (pre placement with `parallel_residual`)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Activation",
    "DecoderSpec",
    "LayerSpec",
    "MLPSpec",
    "MoESpec",
    "NormPlacement",
    "NormSpec",
    "QKNorm",
    "RopeScaling",
    "RopeScalingKind",
    "RopeSpec",
]

Activation = Literal["silu", "gelu", "gelu_tanh"]
"""Activation of a feed-forward block; `gelu` is the exact one, `gelu_tanh` its tanh approximation."""

NormPlacement = Literal["pre", "post", "sandwich"]

QKNorm = Literal["none", "head", "projection"]
"""RMS norm of queries and keys: none, of each head, or of the whole projection (OLMo 2)."""

RopeScalingKind = Literal["linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    """The norm that all places of a model share: `rms`, or `layer`, which subtracts the mean and carries a bias."""

    kind: Literal["rms", "layer"]
    eps: float

    @property
    def has_bias(self) -> bool:
        """Whether the norm adds a bias."""
        return self.kind == "layer"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was trained on.

    `attention_factor` multiplies cos and sin and is already resolved. `short_factors` and `long_factors` belong to
    `longrope` (one divisor a frequency), the `*_freq_factor` fields to `llama3`, the `beta_*` fields to `yarn`.
    """

    kind: RopeScalingKind
    factor: float
    original_max_positions: int
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions of the first `rotary_dim` dimensions of a head; layers with equal specs share one table."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class MLPSpec:
    """A dense feed-forward block: `down(act(gate(x)) * up(x))` if gated, else `down(act(up(x)))`."""

    intermediate_size: int
    activation: Activation
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class MoESpec:
    """A mixture of experts with gated SiLU: softmax over all experts, then the `top_k` best of each token.

    With `norm_topk_prob` the chosen weights are divided by their sum, which equals a softmax over the chosen logits
    alone; the order of softmax and top-k therefore needs no field of its own.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ between the layers of one model.

    `sliding_window` is the number of tokens, itself included, that a token sees (0: all before it). `rope` is None
    where a layer has no rotary positions. Scores are multiplied by `attention_scale`.
    """

    mlp: MLPSpec | MoESpec
    attention_scale: float
    rope: RopeSpec | None
    sliding_window: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """The whole model; sizes in elements, `max_position_embeddings` in tokens (what positions can reach)."""

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    norm_placement: NormPlacement = "pre"
    parallel_residual: bool = False
    learned_positions: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: QKNorm = "none"
    attention_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def q_size(self) -> int:
        """Width of all queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all keys (or values) of a token."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Number of parameters in matrices, tied embeddings counted once; norms and biases are left out."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        if self.learned_positions:
            embeddings += self.max_position_embeddings * self.hidden_size
        attention = (self.q_size + 2 * self.kv_size) * self.hidden_size + self.q_size * self.hidden_size
        return embeddings + sum(attention + self._mlp_parameters(layer.mlp) for layer in self.layers)

    def _mlp_parameters(self, mlp: MLPSpec | MoESpec) -> int:
        if isinstance(mlp, MoESpec):
            return mlp.num_experts * (3 * mlp.intermediate_size * self.hidden_size + self.hidden_size)
        return (3 if mlp.gated else 2) * mlp.intermediate_size * self.hidden_size
