"""BERT and what shares its form: MiniLM, BGE, E5, GTE and most small embedding models."""

from __future__ import annotations

from sagellm_protocol.errors import UnsupportedError

from .encoder_family import EncoderFamily, EncoderNames
from .encoder_spec import EncoderSpec
from .family import activation
from .hf_config import HFConfig
from .spec import MLPSpec

__all__ = ["Bert", "bert_like_spec"]


class Bert(EncoderFamily):
    """`BertModel`, and the encoder of `BertForMaskedLM`."""

    def spec(self, config: HFConfig) -> EncoderSpec:
        """Learned positions from row 0 on; the type of all tokens is that of a first sentence."""
        return bert_like_spec(config)

    def weight_names(self) -> EncoderNames:
        """Models that were trained with a head have `bert.` before their names; the first call norms gamma and beta."""
        return EncoderNames(
            renames=(
                (r"^bert\.", ""),
                (r"LayerNorm\.gamma$", "LayerNorm.weight"),
                (r"LayerNorm\.beta$", "LayerNorm.bias"),
            )
        )


def bert_like_spec(config: HFConfig, *, position_offset: int = 0) -> EncoderSpec:
    """The encoder that BERT's configuration fields describe."""
    kind = config.text("position_embedding_type", default="absolute")
    if kind != "absolute" or config.flag("is_decoder", False):
        what = "is_decoder" if kind == "absolute" else f"position_embedding_type {kind!r}"
        raise UnsupportedError(f"{config.path}: {what} is not supported in an encoder", field="model")
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    if hidden_size % num_heads:
        raise config.error("num_attention_heads", f"must divide hidden_size {hidden_size}, got {num_heads}")
    act = activation(config, "hidden_act", default="gelu")
    if act == "silu":
        raise config.error("hidden_act", "must be a GELU in this architecture")
    return EncoderSpec(
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=config.size("num_hidden_layers"),
        num_heads=num_heads,
        mlp=MLPSpec(config.size("intermediate_size"), act, gated=False, bias=True),
        eps=config.number("layer_norm_eps", default=1e-12),
        max_position_embeddings=config.size("max_position_embeddings", default=512) - position_offset,
        position_offset=position_offset,
        type_vocab_size=config.integer("type_vocab_size", default=2),
    )
