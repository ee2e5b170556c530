"""Qwen3: RMS norms on the heads of queries and keys, no biases on q, k and v, heads of a width of their own."""

from __future__ import annotations

from .family import ModelFamily, llama_like_spec
from .hf_config import HFConfig
from .qwen2 import qwen_windows
from .spec import DecoderSpec

__all__ = ["Qwen3"]


class Qwen3(ModelFamily):
    """`Qwen3ForCausalLM`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """Heads are 128 wide unless the configuration says otherwise."""
        return llama_like_spec(config, windows=qwen_windows(config), default_head_dim=128, qk_norm="head")
