"""Qwen2 and Qwen2.5: Llama with biases on q, k and v; a sliding window in the upper layers if switched on."""

from __future__ import annotations

from .family import ModelFamily, layer_windows, llama_like_spec
from .hf_config import HFConfig
from .spec import DecoderSpec

__all__ = ["Qwen2", "qwen_windows"]


class Qwen2(ModelFamily):
    """`Qwen2ForCausalLM`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """Biases are part of the architecture, not of the configuration."""
        return llama_like_spec(config, windows=qwen_windows(config), qkv_bias=True, o_bias=False)


def qwen_windows(config: HFConfig) -> list[int]:
    """Sliding windows of Qwen2 and Qwen3: from layer `max_window_layers` on, only with `use_sliding_window`."""
    num_layers = config.size("num_hidden_layers")
    window = config.optional_integer("sliding_window", 4096) if config.flag("use_sliding_window", False) else None
    first = config.integer("max_window_layers", default=28)
    return layer_windows(config, num_layers, window, [index >= first for index in range(num_layers)])
