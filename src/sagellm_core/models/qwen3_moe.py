"""Qwen3-MoE: Qwen3 whose feed-forward blocks are mixtures of experts in some or all layers."""

from __future__ import annotations

from .family import ModelFamily, activation, layer_windows, llama_like_spec
from .hf_config import HFConfig
from .spec import DecoderSpec, MLPSpec, MoESpec

__all__ = ["Qwen3Moe"]


class Qwen3Moe(ModelFamily):
    """`Qwen3MoeForCausalLM`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """Every `decoder_sparse_step`-th layer holds experts, except those in `mlp_only_layers`."""
        num_layers = config.size("num_hidden_layers")
        window = config.optional_integer("sliding_window", 4096) if config.flag("use_sliding_window", False) else None
        return llama_like_spec(
            config,
            windows=layer_windows(config, num_layers, window, [True] * num_layers),
            mlps=[self._mlp(config, index) for index in range(num_layers)],
            qk_norm="head",
        )

    def _mlp(self, config: HFConfig, index: int) -> MLPSpec | MoESpec:
        act = activation(config, "hidden_act")
        if act != "silu":
            raise config.error("hidden_act", "must be silu in this architecture")
        step = config.size("decoder_sparse_step", default=1)
        num_experts = config.integer("num_experts", "num_local_experts", default=128)
        if index in (config.sequence("mlp_only_layers") or []) or not num_experts or (index + 1) % step:
            return MLPSpec(config.size("intermediate_size"), act)
        return MoESpec(
            num_experts=num_experts,
            top_k=config.size("num_experts_per_tok", default=8),
            intermediate_size=config.size("moe_intermediate_size", default=768),
            norm_topk_prob=config.flag("norm_topk_prob", False),
        )
