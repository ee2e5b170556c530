"""Phi-3, Phi-3.5 and Phi-4 (text): Llama with joined projections, partial rotary positions and longrope."""

from __future__ import annotations

from .family import ModelFamily, layer_windows, llama_like_spec
from .hf_config import HFConfig
from .rope_config import read_rope
from .spec import DecoderSpec
from .weights import WeightNames

__all__ = ["Phi3"]


class Phi3(ModelFamily):
    """`Phi3ForCausalLM`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """Its `yarn` was longrope before longrope had its name."""
        num_layers = config.size("num_hidden_layers")
        scaling = config.values.get("rope_scaling")
        if isinstance(scaling, dict) and scaling.get("type") == "yarn":
            config = HFConfig({**config.values, "rope_scaling": {**scaling, "type": "longrope"}}, config.path)
        head_dim = config.size("head_dim", default=config.size("hidden_size") // config.size("num_attention_heads"))
        window = config.optional_integer("sliding_window")
        return llama_like_spec(
            config,
            windows=layer_windows(config, num_layers, window, [True] * num_layers),
            rope=read_rope(config, head_dim),
            default_eps=1e-5,
            qkv_bias=False,
            o_bias=False,
        )

    def weight_names(self, spec: DecoderSpec) -> WeightNames:
        """q, k and v, and gate and up, are stored joined."""
        return WeightNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
