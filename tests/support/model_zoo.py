"""Small random checkpoints of every supported family, written by `transformers`: the measure of our own models.

Weights are drawn with a standard deviation of 0.25, norms around one: with the usual 0.02 a model hardly looks at its
context and errors stay hidden. Windows are 8 tokens, so that prompts of a few dozen exceed them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["FAMILIES", "VARIANTS", "build", "make_config", "make_model"]

VOCAB_SIZE = 301
MAX_POSITIONS = 256
WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
_SHORT_FACTORS = [1.0, 1.05, 1.1, 1.3]
_LONG_FACTORS = [1.2, 2.0, 4.5, 9.0]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": _SHORT_FACTORS,
    "long_factor": _LONG_FACTORS,
}

# Name -> (configuration class, what differs from the common fields).
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 24}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **_EXPERTS,
            "num_experts": 6,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "head_dim": 16,
        },
    ),
    "mixtral": ("MixtralConfig", {**_EXPERTS, "num_local_experts": 4, "sliding_window": WINDOW}),
    "phi3": (
        "Phi3Config",
        {
            "sliding_window": WINDOW,
            "original_max_position_embeddings": 128,
            "rope_parameters": _LONGROPE,
        },
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 24, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 24, "sliding_window": WINDOW, "query_pre_attn_scalar": 20, "sliding_window_pattern": 3},
    ),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 4}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": MAX_POSITIONS}),
    "gpt_neox": ("GPTNeoXConfig", {}),
}

_ROPE = {"rope_theta": 10000.0}
_YARN = {**_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    **_ROPE,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Name -> (family, what differs from it): the corners of the families.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3-linear": (
        "gemma3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
            "final_logit_softcapping": 20.0,
        },
    ),
    "gpt2-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 80, "activation_function": "gelu"}),
    "gpt_neox-serial": (
        "gpt_neox",
        {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-dynamic": (
        "llama",
        {"rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32},
    ),
    "llama-linear": ("llama", {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}},
    ),
    "phi3-long": ("phi3", {"original_max_position_embeddings": 32, "sliding_window": None}),
    "phi3-plain": ("phi3", {"rope_parameters": None, "partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "qwen3_moe-sparse": ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2, "norm_topk_prob": False}),
    "smollm3-windows": ("smollm3", {"use_sliding_window": True, "sliding_window": WINDOW}),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""Every supported family, by the name of its module."""

VARIANTS: tuple[str, ...] = tuple(_VARIANTS)
"""Corners of the families that `build` knows as well: positions, biases, tied weights."""


def build(family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Write a checkpoint of `family` (or variant) to `folder` and return the `transformers` model in eval mode."""
    model = make_model(family, seed=seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # model.to would round the rotary frequencies, too
    model.config.dtype = dtype
    model.save_pretrained(folder)
    return model


def make_model(family: str, *, seed: int = 0) -> Any:
    """A random float32 `transformers` model of `family` (or variant), in eval mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(make_config(family), attn_implementation="eager")
    _draw_weights(model, torch.Generator().manual_seed(seed))
    return model.eval()


def make_config(family: str) -> Any:
    """The `transformers` configuration of `family` (or variant)."""
    base, changes = _VARIANTS.get(family, (family, {}))
    class_name, fields = _FAMILIES[base]
    config_class: Callable[..., Any] = getattr(importlib.import_module("transformers"), class_name)
    common = dict(_COMMON)
    if base == "gpt2":
        common = {key: common[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    if base == "gpt_neox":
        del common["num_key_value_heads"]
    return config_class(**{**common, **fields, **changes})


@torch.no_grad()
def _draw_weights(model: Any, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        if is_norm:
            # Around what the norm starts from: one, or zero where it adds one itself.
            parameter.copy_(parameter.mean().round() + 0.25 * noise)
        else:
            parameter.copy_(0.25 * noise)
