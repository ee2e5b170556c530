"""Gemma 2: norms around both blocks, soft caps on scores and logits, a sliding window in every other layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .family import ModelFamily, activation, layer_windows, llama_like_spec
from .hf_config import HFConfig
from .spec import DecoderSpec, LayerSpec, MLPSpec, RopeSpec
from .weights import WeightNames

__all__ = ["Gemma2", "gemma_spec", "gemma_weight_names"]


class Gemma2(ModelFamily):
    """`Gemma2ForCausalLM`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """The first layer slides, the second sees all, and so on."""
        num_layers = config.size("num_hidden_layers")
        windows = layer_windows(
            config,
            num_layers,
            config.optional_integer("sliding_window", 4096),
            [index % 2 == 0 for index in range(num_layers)],
        )
        return replace(
            gemma_spec(config, windows),
            attention_soft_cap=config.optional_number("attn_logit_softcapping", 50.0) or 0.0,
            logit_soft_cap=config.optional_number("final_logit_softcapping", 30.0) or 0.0,
        )

    def weight_names(self, spec: DecoderSpec) -> WeightNames:
        """Gemma's."""
        return gemma_weight_names()


def gemma_spec(config: HFConfig, windows: Sequence[int], ropes: Sequence[RopeSpec] | None = None) -> DecoderSpec:
    """What Gemma 2 and 3 have in common; `ropes` gives each layer's positions where they differ."""
    act = activation(config, "hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    mlp = MLPSpec(config.size("intermediate_size"), act)
    rope = ropes[0] if ropes else None
    spec = llama_like_spec(
        config,
        windows=windows,
        mlps=[mlp] * len(windows),
        rope=rope,
        default_head_dim=256,
        tie_word_embeddings=True,
    )
    scale = config.number("query_pre_attn_scalar", default=256.0) ** -0.5
    layers = [
        LayerSpec(mlp, scale, ropes[index] if ropes else layer.rope, layer.sliding_window)
        for index, layer in enumerate(spec.layers)
    ]
    return replace(
        spec, layers=tuple(layers), norm_placement="sandwich", embedding_scale=float(spec.hidden_size) ** 0.5
    )


def gemma_weight_names() -> WeightNames:
    """Llama's names but for the norm before the feed-forward block; norm weights are stored minus one."""
    return WeightNames(mlp_norm="pre_feedforward_layernorm", norm_offset=1.0)
