"""GPT-NeoX and Pythia: attention and feed-forward side by side, rotary positions on a part of each head."""

from __future__ import annotations

from .family import ModelFamily, activation
from .hf_config import HFConfig
from .rope_config import reachable_positions, read_rope
from .spec import DecoderSpec, LayerSpec, MLPSpec, NormSpec
from .weights import WeightNames

__all__ = ["GPTNeoX"]


class GPTNeoX(ModelFamily):
    """`GPTNeoXForCausalLM`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """Rotary positions on the first quarter of a head unless the configuration says otherwise."""
        hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
        head_dim = hidden_size // num_heads
        rope = read_rope(config, head_dim, default_partial=0.25)
        mlp = MLPSpec(config.size("intermediate_size"), activation(config, "hidden_act", default="gelu"), False, True)
        if mlp.activation == "silu":
            raise config.error("hidden_act", "must be a GELU in this architecture")
        has_bias = config.flag("attention_bias", True)
        max_positions = config.size("max_position_embeddings", default=2048)
        return DecoderSpec(
            vocab_size=config.size("vocab_size"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            max_position_embeddings=reachable_positions(max_positions, rope),
            layers=(LayerSpec(mlp, head_dim**-0.5, rope),) * config.size("num_hidden_layers"),
            norm=NormSpec("layer", config.number("layer_norm_eps", default=1e-5)),
            parallel_residual=config.flag("use_parallel_residual", True),
            qkv_bias=has_bias,
            o_bias=has_bias,
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
        )

    def weight_names(self, spec: DecoderSpec) -> WeightNames:
        """q, k and v are joined head by head; the output projection had another name before transformers 5."""
        return WeightNames(
            embedding="gpt_neox.embed_in",
            final_norm="gpt_neox.final_layer_norm",
            layer="gpt_neox.layers.{layer}.",
            qkv=("attention.query_key_value",),
            qkv_layout="per_head",
            o="attention.dense",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            renames=((r"^embed_out\.", "lm_head."),),
            ignored=(r"\.attention\.(bias|masked_bias)$", r"\.rotary_emb\.inv_freq$"),
        )
