"""RoBERTa and XLM-RoBERTa (Multilingual E5, BGE-M3): BERT whose positions begin behind that of the padding token."""

from __future__ import annotations

from .bert import bert_like_spec
from .encoder_family import EncoderFamily, EncoderNames
from .encoder_spec import EncoderSpec
from .hf_config import HFConfig

__all__ = ["Roberta"]


class Roberta(EncoderFamily):
    """`RobertaModel` and `XLMRobertaModel`, and the encoders of their `ForMaskedLM`."""

    def spec(self, config: HFConfig) -> EncoderSpec:
        """The first token stands at position `pad_token_id` + 1."""
        return bert_like_spec(config, position_offset=config.integer("pad_token_id", default=1) + 1)

    def weight_names(self) -> EncoderNames:
        """Models that were trained with a head have `roberta.` before their names."""
        return EncoderNames(renames=((r"^roberta\.", ""),))
