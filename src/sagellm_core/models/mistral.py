"""Mistral: Llama with a sliding window in every layer (dropped again from version 0.2 on)."""

from __future__ import annotations

from .family import ModelFamily, layer_windows, llama_like_spec
from .hf_config import HFConfig
from .spec import DecoderSpec

__all__ = ["Mistral"]


class Mistral(ModelFamily):
    """`MistralForCausalLM`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """A window of 4096 where the configuration says nothing; none where it says null."""
        num_layers = config.size("num_hidden_layers")
        window = config.optional_integer("sliding_window", 4096)
        windows = layer_windows(config, num_layers, window, [True] * num_layers)
        return llama_like_spec(config, windows=windows, qkv_bias=False, o_bias=False)
