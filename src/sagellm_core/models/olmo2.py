"""OLMo 2: norms behind the blocks instead of before them, and over whole query and key projections."""

from __future__ import annotations

from dataclasses import replace

from .family import ModelFamily, llama_like_spec
from .hf_config import HFConfig
from .spec import DecoderSpec

__all__ = ["Olmo2"]


class Olmo2(ModelFamily):
    """`Olmo2ForCausalLM`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """Post-norm; the residual stream itself enters attention and feed-forward."""
        return replace(llama_like_spec(config, default_eps=1e-5, qk_norm="projection"), norm_placement="post")
