"""What a model family is: a configuration turned into a `DecoderSpec`, and the names of its weights.

`MODELS` in `registry.py` names one `ModelFamily` an architecture. Helpers that several families share stand here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from sagellm_protocol.errors import UnsupportedError

from .hf_config import HFConfig
from .rope_config import reachable_positions, read_rope
from .spec import Activation, DecoderSpec, LayerSpec, MLPSpec, MoESpec, NormSpec, QKNorm, RopeSpec
from .weights import WeightNames

__all__ = ["ModelFamily", "activation", "head_sizes", "layer_windows", "llama_like_spec"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}


class ModelFamily(ABC):
    """One family of models; stateless."""

    @abstractmethod
    def spec(self, config: HFConfig) -> DecoderSpec:
        """The specification that `config` describes; raises `InvalidArgumentError` or `UnsupportedError`."""

    def weight_names(self, spec: DecoderSpec) -> WeightNames:
        """Names and layout of the family's checkpoints; Llama's unless overridden."""
        return WeightNames()


def activation(config: HFConfig, *names: str, default: str = "silu") -> Activation:
    """The activation that a configuration names."""
    name = config.text(*names, default=default)
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{config.path}: activation {name!r} is not supported; supported: {', '.join(sorted(_ACTIVATIONS))}",
            field=names[0],
        )
    return _ACTIVATIONS[name]


def head_sizes(config: HFConfig, *, default_head_dim: int | None = None) -> tuple[int, int, int]:
    """(num_heads, num_kv_heads, head_dim) of a configuration."""
    num_heads = config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"must divide num_attention_heads {num_heads}, got {num_kv_heads}")
    head_dim = config.size("head_dim", default=default_head_dim or config.size("hidden_size") // num_heads)
    return num_heads, num_kv_heads, head_dim


def layer_windows(config: HFConfig, num_layers: int, window: int | None, pattern: Sequence[bool]) -> list[int]:
    """Sliding window of each layer, 0 where there is none: by `layer_types`, else where `pattern` is true."""
    layer_types = config.sequence("layer_types")
    if layer_types is not None:
        if len(layer_types) < num_layers:
            raise config.error("layer_types", f"must name all {num_layers} layers, got {len(layer_types)}")
        unknown = set(layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise UnsupportedError(
                f"{config.path}: layer type {sorted(unknown)[0]!r} is not supported; "
                "supported: full_attention, sliding_attention",
                field="layer_types",
            )
        pattern = [layer_type == "sliding_attention" for layer_type in layer_types[:num_layers]]
    return [window or 0 if slides else 0 for slides in pattern]


def llama_like_spec(
    config: HFConfig,
    *,
    windows: Sequence[int] | None = None,
    has_rope: Sequence[bool] | None = None,
    mlps: Sequence[MLPSpec | MoESpec] | None = None,
    rope: RopeSpec | None = None,
    default_theta: float = 10_000.0,
    default_eps: float = 1e-6,
    default_head_dim: int | None = None,
    qkv_bias: bool | None = None,
    o_bias: bool | None = None,
    qk_norm: QKNorm = "none",
    tie_word_embeddings: bool = False,
) -> DecoderSpec:
    """A pre-norm decoder with RMS norms, rotary positions and gated feed-forward blocks, as most families are.

    The keyword arguments say what differs layer by layer (None: the same in all) and what to assume where the
    configuration is silent. Biases follow `attention_bias` and `mlp_bias` unless given.
    """
    num_layers = config.size("num_hidden_layers")
    num_heads, num_kv_heads, head_dim = head_sizes(config, default_head_dim=default_head_dim)
    rope = rope or read_rope(config, head_dim, default_theta=default_theta)
    if mlps is None:
        act = activation(config, "hidden_act")
        dense = MLPSpec(config.size("intermediate_size"), act, bias=config.flag("mlp_bias", False))
        mlps = [dense] * num_layers
    windows = windows or [0] * num_layers
    has_rope = has_rope or [True] * num_layers
    attention_bias = config.flag("attention_bias", False)
    return DecoderSpec(
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=reachable_positions(config.size("max_position_embeddings", default=2048), rope),
        layers=tuple(
            LayerSpec(mlps[i], head_dim**-0.5, rope if has_rope[i] else None, windows[i]) for i in range(num_layers)
        ),
        norm=NormSpec("rms", config.number("rms_norm_eps", default=default_eps)),
        qkv_bias=attention_bias if qkv_bias is None else qkv_bias,
        o_bias=attention_bias if o_bias is None else o_bias,
        qk_norm=qk_norm,
        tie_word_embeddings=config.flag("tie_word_embeddings", tie_word_embeddings),
    )
