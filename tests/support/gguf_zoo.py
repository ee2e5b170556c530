"""Writes a model of the zoo as a GGUF file, named and laid out as llama.cpp's converters do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter

__all__ = ["GGUF_FAMILIES", "write_gguf"]

GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def write_gguf(
    model: Any,
    file: Path,
    *,
    matrices: GGMLQuantizationType = GGMLQuantizationType.F32,
    rope_freqs: list[float] | None = None,
    **metadata: int,
) -> None:
    """Write a `transformers` model; `matrices` is the type of its matrices, `metadata` extra whole numbers.

    With a quantized type, the model's own matrices are replaced by what the file holds after rounding.
    """
    family = model.config.model_type.removesuffix("_text")
    writer = GGUFWriter(file, family)
    _write_metadata(writer, model.config, family)
    for key, value in metadata.items():
        writer.add_uint32(key, value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_freqs, dtype=np.float32))
    written = set()
    for name, parameter in model.named_parameters():
        stored_name, tensor = _convert(name, parameter.detach(), model.config, family)
        written.add(stored_name)
        if parameter.dim() == 1:
            writer.add_tensor(stored_name, tensor.numpy())
            continue
        data = gguf.quantize(tensor.numpy(), matrices)
        writer.add_tensor(stored_name, data, raw_dtype=matrices)
        rounded = torch.from_numpy(gguf.dequantize(data, matrices)).reshape(tensor.shape)
        parameter.data = _restore(stored_name, rounded, model.config, family)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: GGUFWriter, config: Any, family: str) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    if family == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if family != "phi3":
        writer.add_key_length(head_dim)
    if family in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family == "phi3":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(model_attention_factor(config))
        for kind in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], dtype=np.float32))


def model_attention_factor(config: Any) -> float:
    """Phi-3's, as its converter computes it."""
    original = config.original_max_position_embeddings
    return float((1 + np.log(config.max_position_embeddings / original) / np.log(original)) ** 0.5)


def _convert(name: str, tensor: torch.Tensor, config: Any, family: str) -> tuple[str, torch.Tensor]:
    stem, suffix = name.rsplit(".", 1)
    layer = re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)", stem)
    stored = _NAMES[stem] if layer is None else f"blk.{layer[1]}.{_layer_name(layer[2], family)}"
    if family.startswith("gemma") and "norm" in stored:
        tensor = tensor + 1
    if family == "gpt2" and tensor.dim() == 2 and layer is not None:
        tensor = tensor.t()
    if family == "llama" and stored.endswith(("attn_q", "attn_k")):
        tensor = _interleave(tensor, _heads(stored, config))
    return f"{stored}.{suffix}", tensor.contiguous()


def _restore(stored: str, tensor: torch.Tensor, config: Any, family: str) -> torch.Tensor:
    """A matrix back in the layout of transformers."""
    stem = stored.rsplit(".", 1)[0]
    if family == "gpt2" and stem.startswith("blk."):
        return tensor.t().contiguous()
    if family == "llama" and stem.endswith(("attn_q", "attn_k")):
        heads = _heads(stem, config)
        return tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _heads(stored: str, config: Any) -> int:
    return int(config.num_attention_heads if stored.endswith("attn_q") else config.num_key_value_heads)


def _interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The permutation of llama.cpp's converter for Llama."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)


def _layer_name(name: str, family: str) -> str:
    if family.startswith("gemma"):
        norms = {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
        if name in norms:
            return norms[name]
    return _LAYER_NAMES.get(name, "ffn_norm") if name == "post_attention_layernorm" else _LAYER_NAMES[name]
