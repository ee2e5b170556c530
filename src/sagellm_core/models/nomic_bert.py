"""Nomic Embed Text: BERT with rotary positions, gated SiLU and no biases, for longer texts."""

from __future__ import annotations

from sagellm_protocol.errors import UnsupportedError

from .encoder_family import EncoderFamily, EncoderNames
from .encoder_spec import EncoderSpec
from .hf_config import HFConfig
from .rope_config import read_rope
from .spec import MLPSpec

__all__ = ["NomicBert"]

_SILU = ("silu", "swiglu")


class NomicBert(EncoderFamily):
    """`NomicBertModel`, by its own configuration fields or by the common ones."""

    def spec(self, config: HFConfig) -> EncoderSpec:
        """No further than it was trained on, where the configuration says how far that was."""
        act = config.text("activation_function", "hidden_act", default="swiglu")
        biases = any(config.flag(name, False) for name in ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"))
        if act not in _SILU or biases or config.flag("prenorm", False) or config.flag("use_rms_norm", False):
            raise UnsupportedError(f"{config.path}: only the form of nomic-embed-text is supported", field="model")
        hidden_size, num_heads = config.size("n_embd", "hidden_size"), config.size("n_head", "num_attention_heads")
        reach = config.size("n_positions", "max_position_embeddings", default=2048)
        return EncoderSpec(
            vocab_size=config.size("vocab_size"),
            hidden_size=hidden_size,
            num_layers=config.size("n_layer", "num_hidden_layers"),
            num_heads=num_heads,
            mlp=MLPSpec(config.size("n_inner", "intermediate_size"), "silu", gated=True),
            eps=config.number("layer_norm_epsilon", "layer_norm_eps", default=1e-12),
            max_position_embeddings=min(reach, config.size("max_trained_positions", default=reach)),
            type_vocab_size=config.integer("type_vocab_size", default=2),
            rope=read_rope(config, hidden_size // num_heads, default_theta=1000.0),
            attention_bias=False,
        )

    def weight_names(self) -> EncoderNames:
        """Queries, keys and values are stored joined."""
        return EncoderNames(
            embedding_norm="emb_ln",
            layer="encoder.layers.{layer}.",
            qkv=("attn.Wqkv",),
            o="attn.out_proj",
            attention_norm="norm1",
            gate_up=("mlp.fc12", "mlp.fc11"),
            down="mlp.fc2",
            mlp_norm="norm2",
            renames=((r"^bert\.", ""),),
        )
