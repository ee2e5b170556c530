"""SmolLM3: Llama with every fourth layer free of positions (NoPE)."""

from __future__ import annotations

from .family import ModelFamily, layer_windows, llama_like_spec
from .hf_config import HFConfig
from .spec import DecoderSpec

__all__ = ["SmolLM3"]


class SmolLM3(ModelFamily):
    """`SmolLM3ForCausalLM`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """`no_rope_layers` holds 1 for layers with rotary positions; windows, if switched on, are in the others."""
        num_layers = config.size("num_hidden_layers")
        interval = config.size("no_rope_layer_interval", default=4)
        listed = config.sequence("no_rope_layers") or [(index + 1) % interval != 0 for index in range(num_layers)]
        if len(listed) < num_layers:
            raise config.error("no_rope_layers", f"must have {num_layers} entries, got {len(listed)}")
        has_rope = [bool(flag) for flag in listed[:num_layers]]
        window = config.optional_integer("sliding_window") if config.flag("use_sliding_window", False) else None
        return llama_like_spec(
            config,
            windows=layer_windows(config, num_layers, window, [not rope for rope in has_rope]),
            has_rope=has_rope,
            default_theta=2_000_000.0,
            tie_word_embeddings=True,
        )
