"""GGUF files: their metadata as a configuration, their tensors as a source of weights.

The metadata is translated into the fields of a Hugging Face configuration and handed to the family it belongs to, so
that a model means the same from either format; what GGUF leaves to the reader (Gemma's window pattern and score
scale) is filled in as llama.cpp does. Architectures whose names map one to one are supported: see `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm_core.gguf_metadata import GGUFHeader, GGUFTensor, read_gguf_header
from sagellm_protocol.dtypes import DType
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError

from .checkpoint import TensorInfo
from .config import ModelConfig
from .hf_config import HFConfig
from .mapped_file import MappedFile
from .registry import get_family
from .spec import DecoderSpec
from .weights import WeightNames

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import QuantizedTensor

__all__ = ["ARCHITECTURES", "GGUFCheckpoint", "gguf_weight_names", "read_gguf_config"]

ARCHITECTURES: dict[str, str] = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""GGUF's name of an architecture -> Hugging Face's."""

_F32, _F16, _BF16 = 0, 1, 30  # ggml's numbers of the types that are not quantized
_TYPE_NAMES = {_F32: "F32", _F16: "F16", _BF16: "BF16"}
_ROPE_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")

_NAMES = WeightNames(
    embedding="token_embd",
    positions="position_embd",
    final_norm="output_norm",
    lm_head="output",
    layer="blk.{layer}.",
    attention_norm="attn_norm",
    post_attention_norm="post_attention_norm",
    mlp_norm="ffn_norm",
    post_mlp_norm="post_ffw_norm",
    qkv=("attn_q", "attn_k", "attn_v"),
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    o="attn_output",
    gate_up=("ffn_gate", "ffn_up"),
    up="ffn_up",
    down="ffn_down",
    ignored=(rf"^({'|'.join(_ROPE_TENSORS)})\.weight$",),
)


class GGUFCheckpoint:
    """The tensors of a GGUF file as a `TensorSource`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: GGUFHeader = read_gguf_header(path)
        self._mapped = MappedFile(path)
        self.tensors = {
            name: TensorInfo(path, _TYPE_NAMES.get(tensor.type_id, "quantized"), tensor.shape, tensor.offset)
            for name, tensor in self.header.tensors.items()
        }
        if self.header.metadata.get("split.count", 1) > 1:
            raise UnsupportedError(f"{path}: one of several parts; merge them with llama.cpp's gguf-split first")

    def read(self, name: str) -> Tensor:
        """The tensor `name`: as stored if it is F32, F16 or BF16, else dequantized to float32."""
        import torch

        tensor = self.header.tensors[name]
        kind, num_bytes = _quantization(self.path, name, tensor)
        stored = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}.get(tensor.type_id)
        if stored is not None:
            return self._mapped.tensor(tensor.offset, tensor.shape, stored)
        return _dequantize(self.path, name, self._blocks(tensor, num_bytes), kind).reshape(tensor.shape)

    def read_quantized(self, name: str) -> QuantizedTensor | None:
        """See `TensorSource.read_quantized`."""
        from .gguf_blocks import BLOCK_TYPES, read_blocks

        tensor = self.header.tensors[name]
        kind, num_bytes = _quantization(self.path, name, tensor)
        if kind.name not in BLOCK_TYPES or len(tensor.shape) != 2:
            return None
        return read_blocks(kind.name, self._blocks(tensor, num_bytes), (tensor.shape[0], tensor.shape[1]))

    def release(self) -> None:
        """See `TensorSource.release`."""
        self._mapped.release()

    def _blocks(self, tensor: GGUFTensor, num_bytes: int) -> Tensor:
        import torch

        return self._mapped.tensor(tensor.offset, (num_bytes,), torch.uint8)


def read_gguf_config(path: Path) -> ModelConfig:
    """The model that a GGUF file holds, from its header alone.

    Raises `UnsupportedError` for an architecture that cannot be read from GGUF, `InvalidArgumentError` for a broken
    file.
    """
    checkpoint = GGUFCheckpoint(path)
    metadata = checkpoint.header.metadata
    name = str(metadata.get("general.architecture", "unknown"))
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: GGUF architecture {name!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}",
            field="general.architecture",
        )
    if metadata.get(f"{name}.expert_count", 0):
        raise UnsupportedError(f"{path}: mixtures of experts are not read from GGUF; use the model's safetensors")
    spec = get_family(ARCHITECTURES[name]).spec(HFConfig(_as_hf_config(checkpoint, name), path))
    ends = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return ModelConfig(
        path=path,
        architecture=ARCHITECTURES[name],
        spec=spec,
        dtype=_dtype(checkpoint),
        max_model_len=spec.max_position_embeddings,
        eos_token_ids=tuple(dict.fromkeys(int(token_id) for token_id in ends if token_id is not None)),
    )


def gguf_weight_names(checkpoint: GGUFCheckpoint, spec: DecoderSpec) -> WeightNames:
    """Names and layout of the file's tensors. Norm weights are stored as they are used, linear ones [out, in]."""
    architecture = checkpoint.header.metadata.get("general.architecture")
    if architecture == "llama":
        return replace(_NAMES, qkv_layout="rotary_pairs")
    if architecture == "phi3":
        return replace(_NAMES, qkv=("attn_qkv",), gate_up=("ffn_up",))
    if architecture == "gpt2":
        return replace(_NAMES, qkv=("attn_qkv",))
    return _NAMES


def _as_hf_config(checkpoint: GGUFCheckpoint, name: str) -> dict[str, Any]:
    """The fields of config.json that correspond to the metadata."""
    metadata, tensors = checkpoint.header.metadata, checkpoint.header.tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise InvalidArgumentError(f"{checkpoint.path}: has no token_embd.weight; download the file again")
    fields = {
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
        "rope_theta": "rope.freq_base",
        "sliding_window": "attention.sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
    config: dict[str, Any] = {field: metadata.get(f"{name}.{key}") for field, key in fields.items()}
    config["vocab_size"], config["hidden_size"] = embedding.shape
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    heads = int(config["num_attention_heads"] or 1)
    head_dim = int(config["head_dim"] or config["hidden_size"] // heads)
    rotary_dim = metadata.get(f"{name}.rope.dimension_count")
    if rotary_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    if name == "gpt2":
        config["n_inner"] = config["intermediate_size"]
        config["n_positions"] = config["max_position_embeddings"]
        config["num_key_value_heads"] = None
    if name in ("gemma2", "gemma3"):
        config.update(_gemma_fields(metadata, name, config, head_dim))
    config["rope_scaling"] = _rope_scaling(checkpoint, name, config)
    return config


def _gemma_fields(metadata: Mapping[str, Any], name: str, config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """What llama.cpp knows about Gemma without being told."""
    is_27b = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[name]
    width = config["hidden_size"] // config["num_attention_heads"] if is_27b else head_dim
    fields: dict[str, Any] = {"query_pre_attn_scalar": width, "head_dim": head_dim}
    if name == "gemma3":
        fields["rope_local_base_freq"] = metadata.get("gemma3.rope.freq_base_swa", 10_000.0)
    return fields


def _rope_scaling(checkpoint: GGUFCheckpoint, name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling object; divisors of single frequencies come as tensors (Llama 3, Phi-3)."""
    metadata = checkpoint.header.metadata
    original = metadata.get(f"{name}.rope.scaling.original_context_length") or config["max_position_embeddings"]
    attention_factor = metadata.get(f"{name}.rope.scaling.attn_factor")
    for short, long in (("rope_freqs", "rope_freqs"), ("rope_factors_short", "rope_factors_long")):
        if f"{short}.weight" in checkpoint.tensors:
            return {
                "rope_type": "longrope",
                "short_factor": checkpoint.read(f"{short}.weight").tolist(),
                "long_factor": checkpoint.read(f"{long}.weight").tolist(),
                "original_max_position_embeddings": original,
                "attention_factor": attention_factor or (1.0 if short == "rope_freqs" else None),
            }
    kind = metadata.get(f"{name}.rope.scaling.type", "none")
    if kind == "none":
        return None
    return {
        "rope_type": kind,
        "factor": metadata.get(f"{name}.rope.scaling.factor"),
        "original_max_position_embeddings": original,
        "attention_factor": attention_factor,
    }


def _dtype(checkpoint: GGUFCheckpoint) -> DType:
    """The dtype that loses nothing: that of the matrices, float16 for quantized ones (finer than any of them)."""
    stored = {info.dtype for info in checkpoint.tensors.values() if len(info.shape) > 1}
    return {"F32": DType.FP32, "BF16": DType.BF16}.get(stored.pop() if len(stored) == 1 else "", DType.FP16)


def _quantization(path: Path, name: str, tensor: GGUFTensor) -> tuple[Any, int]:
    """(the gguf package's type of a tensor, bytes it takes)."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(tensor.type_id)
    except ValueError as error:
        raise UnsupportedError(
            f"{path}: {name} has the unknown type {tensor.type_id}; update the package gguf"
        ) from error
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    num_elements = 1
    for size in tensor.shape:
        num_elements *= size
    return kind, num_elements // per_block * block_bytes


def _dequantize(path: Path, name: str, raw: Tensor, kind: Any) -> Tensor:
    import torch
    from gguf.quants import dequantize

    try:
        return torch.from_numpy(dequantize(raw.numpy(), kind))
    except NotImplementedError as error:
        raise UnsupportedError(f"{path}: {name} is stored as {kind.name}, which cannot be dequantized here") from error
