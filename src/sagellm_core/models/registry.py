"""Architecture -> family. A new model is one file and one line here."""

from __future__ import annotations

import importlib

from sagellm_protocol.errors import UnsupportedError

from .encoder_family import EncoderFamily
from .family import ModelFamily
from .hf_config import HFConfig

__all__ = ["MODELS", "architecture_of", "get_family"]

MODELS: dict[str, str] = {
    "BertForMaskedLM": "bert:Bert",
    "BertModel": "bert:Bert",
    "GPT2LMHeadModel": "gpt2:GPT2",
    "GPTNeoXForCausalLM": "gpt_neox:GPTNeoX",
    "Gemma2ForCausalLM": "gemma2:Gemma2",
    "Gemma3ForCausalLM": "gemma3:Gemma3",
    "Gemma3ForConditionalGeneration": "gemma3:Gemma3Multimodal",
    "LlamaForCausalLM": "llama:Llama",
    "MistralForCausalLM": "mistral:Mistral",
    "MixtralForCausalLM": "mixtral:Mixtral",
    "NomicBertModel": "nomic_bert:NomicBert",
    "Olmo2ForCausalLM": "olmo2:Olmo2",
    "Phi3ForCausalLM": "phi3:Phi3",
    "Qwen2ForCausalLM": "qwen2:Qwen2",
    "Qwen3ForCausalLM": "qwen3:Qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe:Qwen3Moe",
    "RobertaForMaskedLM": "roberta:Roberta",
    "RobertaModel": "roberta:Roberta",
    "SmolLM3ForCausalLM": "smollm3:SmolLM3",
    "XLMRobertaForMaskedLM": "roberta:Roberta",
    "XLMRobertaModel": "roberta:Roberta",
}
"""Architecture, as `config.json` names it, -> `module:class` in this package, imported when it is needed."""


def get_family(architecture: str) -> ModelFamily | EncoderFamily:
    """The family of `architecture`; raises `UnsupportedError`, listing the supported ones."""
    target = MODELS.get(architecture)
    if target is None:
        raise UnsupportedError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(MODELS))}",
            field="architectures",
        )
    module, _, name = target.partition(":")
    family: ModelFamily | EncoderFamily = getattr(importlib.import_module(f"{__package__}.{module}"), name)()
    return family


def architecture_of(config: HFConfig) -> str:
    """The architecture that a configuration names, or that belongs to its `model_type` where it names none."""
    architectures = config.sequence("architectures") or []
    known = [name for name in architectures if name in MODELS]
    if known:
        return str(known[0])
    if architectures:
        return str(architectures[0])
    model_type = config.text("model_type").removesuffix("_text")
    for architecture, target in MODELS.items():
        if target.partition(":")[0] == model_type:
            return architecture
    return model_type
