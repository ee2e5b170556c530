"""GPT-2: learned positions, layer norms, biases everywhere, a plain GELU block, weights stored [in, out]."""

from __future__ import annotations

from .family import ModelFamily, activation
from .hf_config import HFConfig
from .spec import DecoderSpec, LayerSpec, MLPSpec, NormSpec
from .weights import WeightNames

__all__ = ["GPT2"]


class GPT2(ModelFamily):
    """`GPT2LMHeadModel`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """Fields go by GPT-2's own names, or by the common ones."""
        hidden_size = config.size("n_embd", "hidden_size", default=768)
        num_layers = config.size("n_layer", "num_hidden_layers", default=12)
        num_heads = config.size("n_head", "num_attention_heads", default=12)
        mlp = MLPSpec(
            config.size("n_inner", default=4 * hidden_size),
            activation(config, "activation_function", default="gelu_new"),
            gated=False,
            bias=True,
        )
        if mlp.activation == "silu":
            raise config.error("activation_function", "must be a GELU in this architecture")
        head_dim = hidden_size // num_heads
        scale = head_dim**-0.5 if config.flag("scale_attn_weights", True) else 1.0
        by_depth = config.flag("scale_attn_by_inverse_layer_idx", False)
        return DecoderSpec(
            vocab_size=config.size("vocab_size", default=50257),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            max_position_embeddings=config.size("n_positions", "n_ctx", "max_position_embeddings", default=1024),
            layers=tuple(LayerSpec(mlp, scale / (i + 1) if by_depth else scale, None) for i in range(num_layers)),
            norm=NormSpec("layer", config.number("layer_norm_epsilon", default=1e-5)),
            learned_positions=True,
            qkv_bias=True,
            o_bias=True,
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
        )

    def weight_names(self, spec: DecoderSpec) -> WeightNames:
        """The first checkpoints have no `transformer.` before their names, and hold the causal masks."""
        return WeightNames(
            embedding="transformer.wte",
            positions="transformer.wpe",
            final_norm="transformer.ln_f",
            layer="transformer.h.{layer}.",
            attention_norm="ln_1",
            mlp_norm="ln_2",
            qkv=("attn.c_attn",),
            o="attn.c_proj",
            up="mlp.c_fc",
            down="mlp.c_proj",
            transposed=True,
            renames=((r"^(?=wte\.|wpe\.|ln_f\.|h\.)", "transformer."),),
            ignored=(r"\.attn\.bias$", r"\.attn\.masked_bias$"),
        )
