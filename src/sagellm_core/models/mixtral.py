"""Mixtral: Mistral whose feed-forward blocks are mixtures of experts."""

from __future__ import annotations

from .family import ModelFamily, activation, layer_windows, llama_like_spec
from .hf_config import HFConfig
from .spec import DecoderSpec, MoESpec
from .weights import WeightNames

__all__ = ["Mixtral"]


class Mixtral(ModelFamily):
    """`MixtralForCausalLM`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """The weights of the chosen experts always sum to one."""
        num_layers = config.size("num_hidden_layers")
        experts = MoESpec(
            num_experts=config.size("num_local_experts", "num_experts", default=8),
            top_k=config.size("num_experts_per_tok", default=2),
            intermediate_size=config.size("intermediate_size"),
            norm_topk_prob=True,
        )
        if activation(config, "hidden_act") != "silu":
            raise config.error("hidden_act", "must be silu in this architecture")
        window = config.optional_integer("sliding_window")
        return llama_like_spec(
            config,
            windows=layer_windows(config, num_layers, window, [True] * num_layers),
            mlps=[experts] * num_layers,
            default_theta=1_000_000.0,
            default_eps=1e-5,
            qkv_bias=False,
            o_bias=False,
        )

    def weight_names(self, spec: DecoderSpec) -> WeightNames:
        """w1 is the gate, w3 up, w2 down."""
        expert = "block_sparse_moe.experts.{expert}."
        return WeightNames(
            router="block_sparse_moe.gate",
            expert_gate_up=(f"{expert}w1", f"{expert}w3"),
            expert_down=f"{expert}w2",
        )
