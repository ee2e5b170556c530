"""Gemma 3 (text): Gemma 2 without soft caps, with norms on heads and two kinds of rotary positions.

Five of six layers see a window and turn with a base of 10,000, the sixth sees all and turns slower. Of the multimodal
checkpoints the text part runs; their vision towers are left unread.
"""

from __future__ import annotations

from dataclasses import replace

from .family import ModelFamily, layer_windows
from .gemma2 import gemma_spec, gemma_weight_names
from .hf_config import HFConfig
from .rope_config import read_rope
from .spec import DecoderSpec, RopeSpec
from .weights import WeightNames

__all__ = ["Gemma3", "Gemma3Multimodal"]

# Published multimodal configurations name only what differs from these.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}


class Gemma3(ModelFamily):
    """`Gemma3ForCausalLM`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """Windows and positions by layer type; the older form of the configuration gives a pattern instead."""
        config = HFConfig({**_DEFAULTS, **config.values}, config.path)
        if config.flag("use_bidirectional_attention", False):
            raise config.error("use_bidirectional_attention", "is not supported: only causal models generate text")
        num_layers = config.size("num_hidden_layers")
        every = config.size("sliding_window_pattern", default=6)
        slides = layer_windows(config, num_layers, 1, [bool((index + 1) % every) for index in range(num_layers)])
        window = config.optional_integer("sliding_window", 4096) or 0
        local, whole = _rope(config, "sliding_attention"), _rope(config, "full_attention")
        spec = gemma_spec(config, [window * flag for flag in slides], [local if flag else whole for flag in slides])
        return replace(
            spec, qk_norm="head", logit_soft_cap=config.optional_number("final_logit_softcapping", None) or 0.0
        )

    def weight_names(self, spec: DecoderSpec) -> WeightNames:
        """Gemma's."""
        return gemma_weight_names()


class Gemma3Multimodal(Gemma3):
    """The text part of `Gemma3ForConditionalGeneration`."""

    def spec(self, config: HFConfig) -> DecoderSpec:
        """That of `text_config`."""
        text = config.section("text_config")
        if text is None:
            raise config.error("text_config", "is missing")
        return super().spec(text)

    def weight_names(self, spec: DecoderSpec) -> WeightNames:
        """The text model lies under `language_model`, at one place or another by version."""
        return replace(
            gemma_weight_names(),
            renames=((r"^language_model\.", ""), (r"^model\.language_model\.", "model.")),
            ignored=(r"^(model\.)?vision_tower\.", r"^(model\.)?multi_modal_projector\."),
        )


def _rope(config: HFConfig, layer_type: str) -> RopeSpec:
    head_dim = config.size("head_dim")
    if config.has("rope_parameters"):
        theta = 10_000.0 if layer_type == "sliding_attention" else 1_000_000.0
        values = {key: value for key, value in config.values.items() if key not in ("rope_theta", "rope_scaling")}
        return read_rope(HFConfig(values, config.path), head_dim, default_theta=theta, layer_type=layer_type)
    if layer_type == "sliding_attention":
        return RopeSpec(config.number("rope_local_base_freq", default=10_000.0), head_dim)
    return read_rope(config, head_dim, default_theta=1_000_000.0)
