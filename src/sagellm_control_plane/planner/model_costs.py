"""What a model weighs and computes, by its `config.json`; no weights are read.

Names are those that Hugging Face configurations use: Llama and its relatives, GPT-2, GPT-NeoX, OPT, BLOOM, mixtures of
experts (Mixtral, Qwen-MoE, DeepSeek) and multi-head latent attention (DeepSeek-V2 and V3).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagellm_protocol import InvalidArgumentError, NotFoundError

# Families whose MLP has two matrices; the others gate with a third.
_UNGATED = {"opt", "bloom", "gpt2", "gpt_neox", "gptj", "falcon", "phi", "starcoder2", "mpt", "gpt_bigcode"}
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float8": 1.0, "int8": 1.0, "int4": 0.5, "float4": 0.5}


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """A decoder-only model in figures. Counts of parameters are of one layer unless the name says otherwise."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_params: int  # of the projections
    mlp_params: int  # of one dense layer
    num_dense_layers: int  # layers without experts
    num_experts: int = 0
    experts_per_token: int = 0
    expert_params: int = 0  # of one expert
    shared_expert_params: int = 0  # of what every token passes beside its experts
    vocab_size: int = 32_000
    is_tied: bool = False  # whether embedding and output share their weights
    latent_dim: int = 0  # of multi-head latent attention: what a token leaves in the cache
    weight_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    max_model_len: int = 1 << 30

    @property
    def weight_bytes(self) -> float:
        """Of one parameter."""
        return _BYTES[self.weight_dtype]

    @property
    def compute_dtype(self) -> str:
        """What is multiplied: weights of 4 bits are widened first."""
        return self.weight_dtype if self.weight_dtype in ("float8", "int8", "float16", "bfloat16") else "bfloat16"

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.num_dense_layers

    @property
    def num_params(self) -> int:
        """Of the whole model."""
        return self.dense_params + self.num_moe_layers * self.num_experts * self.expert_params

    @property
    def dense_params(self) -> int:
        """Those outside of experts, embeddings included."""
        embedding = self.vocab_size * self.hidden_size * (1 if self.is_tied else 2)
        moe = self.shared_expert_params + self.num_experts * self.hidden_size
        layers = self.num_layers * self.attention_params + self.num_dense_layers * self.mlp_params
        return embedding + layers + self.num_moe_layers * moe

    @property
    def active_params(self) -> int:
        """Those that one token passes."""
        return self.dense_params + self.num_moe_layers * self.experts_per_token * self.expert_params

    @property
    def kv_bytes_per_token(self) -> float:
        """Of all layers, on one device that holds all heads."""
        values = self.latent_dim or 2 * self.num_kv_heads * self.head_dim
        return self.num_layers * values * _BYTES[self.kv_dtype]


def read_model_costs(
    path: str | Path | Mapping[str, Any],
    *,
    name: str = "",
    weight_dtype: str | None = None,
    kv_dtype: str | None = None,
) -> ModelCosts:
    """The costs of a model by its `config.json`, or by the folder that holds one, or by what stands in it.

    Raises `NotFoundError` where there is no such file, `InvalidArgumentError` for one that lacks a figure, and for
    unknown types.
    """
    config, found = _load(path)
    config = {**config, **config.get("text_config", {})}
    for field, value in (("weight_dtype", weight_dtype), ("kv_dtype", kv_dtype)):
        if value is not None and value not in _BYTES:
            raise InvalidArgumentError(f"unknown {field} {value!r}; choose one of {', '.join(_BYTES)}", field=field)
    reader = _Reader(config, found)
    hidden, num_layers = reader.size("hidden_size", "n_embd", "n_embed"), reader.size("num_hidden_layers", "n_layer")
    num_heads = reader.size("num_attention_heads", "n_head")
    num_kv_heads = reader.size("num_key_value_heads", default=num_heads)
    head_dim = reader.size("head_dim", default=hidden // num_heads)
    matrices = 2 if config.get("model_type") in _UNGATED else 3
    intermediate = reader.size("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
    num_experts = reader.size("num_local_experts", "num_experts", "n_routed_experts", default=0)
    expert_size = reader.size("moe_intermediate_size", default=intermediate)
    shared_size = reader.size(
        "shared_expert_intermediate_size", default=expert_size * reader.size("n_shared_experts", default=0)
    )
    latent = reader.size("kv_lora_rank", default=0)
    dtype = weight_dtype or _weight_dtype(config)
    return ModelCosts(
        name=name or found,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=reader.size("v_head_dim", default=head_dim) if latent else head_dim,
        attention_params=reader.latent_attention(hidden, num_heads)
        if latent
        else 2 * hidden * (num_heads + num_kv_heads) * head_dim,
        mlp_params=matrices * hidden * intermediate,
        num_dense_layers=_num_dense_layers(config, num_layers) if num_experts else num_layers,
        num_experts=num_experts,
        experts_per_token=reader.size("num_experts_per_tok", "moe_top_k") if num_experts else 0,
        expert_params=3 * hidden * expert_size if num_experts else 0,
        shared_expert_params=3 * hidden * shared_size,
        vocab_size=reader.size("vocab_size"),
        is_tied=bool(config.get("tie_word_embeddings", config.get("model_type") in ("opt", "bloom", "gpt2"))),
        latent_dim=latent + reader.size("qk_rope_head_dim", default=0) if latent else 0,
        weight_dtype=dtype,
        kv_dtype=kv_dtype or "bfloat16",
        max_model_len=reader.size("max_position_embeddings", "n_positions", "seq_length", default=1 << 30),
    )


class _Reader:
    """Sizes of a configuration by any of their names."""

    def __init__(self, config: Mapping[str, Any], found: str) -> None:
        self._config = config
        self._found = found

    def size(self, *names: str, default: int | None = None) -> int:
        """A whole number of at least 0; the first name that is there counts."""
        for name in names:
            value = self._config.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InvalidArgumentError(f"{self._found}: {name} must be a whole number, is {value!r}", field=name)
            if value == 0 and default is None:
                raise InvalidArgumentError(f"{self._found}: {name} must not be 0", field=name)
            return value
        if default is None:
            raise InvalidArgumentError(
                f"{self._found} has no {names[0]}; give the config.json of a decoder-only model", field=names[0]
            )
        return default

    def latent_attention(self, hidden: int, num_heads: int) -> int:
        """Parameters of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""
        latent, rope = self.size("kv_lora_rank"), self.size("qk_rope_head_dim")
        nope, value = self.size("qk_nope_head_dim"), self.size("v_head_dim")
        query_rank = self.size("q_lora_rank", default=0)
        query = num_heads * (nope + rope)
        queries = hidden * query_rank + query_rank * query if query_rank else hidden * query
        return queries + hidden * (latent + rope) + latent * num_heads * (nope + value) + num_heads * value * hidden


def _load(path: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(path, Mapping):
        return dict(path), "config"
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise NotFoundError(f"{file} can't be read ({error.strerror}); check the path", field="model") from error
    except ValueError as error:
        raise InvalidArgumentError(f"{file} is no JSON: {error}; give a config.json", field="model") from error
    if not isinstance(config, dict):
        raise InvalidArgumentError(f"{file} holds no object; give a config.json", field="model")
    return config, str(file)


def _num_dense_layers(config: Mapping[str, Any], num_layers: int) -> int:
    """Layers without experts of a model that has some: the first ones (DeepSeek), or those named (Qwen)."""
    if "first_k_dense_replace" in config:
        return min(num_layers, int(config["first_k_dense_replace"]))
    return min(num_layers, len(config.get("mlp_only_layers") or ()))


def _weight_dtype(config: Mapping[str, Any]) -> str:
    quantization = config.get("quantization_config") or {}
    method = str(quantization.get("quant_method", ""))
    if "fp8" in method:
        return "float8"
    bits = quantization.get("bits") or (4 if "awq" in method or "mxfp4" in method else None)
    if bits in (4, 8):
        return f"int{bits}"
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
    return dtype if dtype in _BYTES else "bfloat16"
