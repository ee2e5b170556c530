"""Llama 1 to 3 and everything that shares their configuration."""

from __future__ import annotations

from .family import ModelFamily, llama_like_spec
from .hf_config import HFConfig
from .spec import DecoderSpec

__all__ = ["Llama"]


class Llama(ModelFamily):
    """`LlamaForCausalLM`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """Pre-norm, grouped-query attention, gated SiLU; biases only where the configuration asks for them."""
        return llama_like_spec(config)
