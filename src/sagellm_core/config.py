"""Configuration of an engine: parsed once, at the edge, into frozen objects.

`LLMEngineConfig` keeps the flat public fields that users write; everything below the engine reads this
object and nothing else (no environment variables, no repeated defaults). `load_config` reads the YAML or
JSON file of `python -m sagellm_core.demo`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from sagellm_compression.quantization import METHODS
from sagellm_protocol import InvalidArgumentError, NotFoundError, SamplingParams, parse
from sagellm_protocol.model import EdgeModel

KVCacheDType = Literal["auto", "fp32", "fp16", "bf16", "int8"]
CommType = Literal["auto", "local", "gloo", "nccl", "hccl"]  # `sagellm_comm.COLLECTIVE_KINDS`, which would import torch


class ConfigModel(EdgeModel):
    """A frozen section of a configuration; unknown keys and bad values raise `InvalidArgumentError`."""


class BackendConfig(ConfigModel):
    """Which device an engine runs on: `kind` as in `get_provider`, `device` such as `cpu` or `cuda:1`."""

    kind: str = "auto"
    device: str | None = None


class LLMEngineConfig(ConfigModel):
    """Everything that `LLMEngine` needs to know before it starts.

    `model_path` is `builtin`, a folder, a `.gguf` file or a hub id. Sizes are in tokens unless the name
    says otherwise; `None` lets the engine choose from the model and the memory that is there.
    """

    model_path: str = Field(min_length=1)
    backend_type: str = "auto"
    comm_type: CommType = Field(default="auto", description="what carries tensors between ranks; one needs none")
    device: str | None = None
    engine_id: str | None = None

    max_batch_size: int = Field(default=32, ge=1, le=4096, description="requests that run at the same time")
    max_model_len: int = Field(default=4096, ge=2, description="prompt + output tokens of one request")
    max_new_tokens: int = Field(default=128, ge=1, description="output tokens where a request names no max_tokens")
    dtype: str = Field(default="auto", description="dtype of the weights: auto (the checkpoint's), fp32, fp16, bf16")
    quantization: str = Field(
        default="none",
        description="weights in whole numbers, made at load: none, int8 (a scale a row), int4 (groups of 32), "
        "int4-g64, int4-g128, int4-asym (with minima)",
    )
    packed_cache_dir: Path | None = Field(
        default=None, description="where quantized weights are kept; None means ~/.cache/sage-llm/packed"
    )
    packed_cache_bytes: int = Field(default=20 * 2**30, ge=0, description="most that they may take; 0 keeps none")
    trust_remote_code: bool = False
    revision: str | None = None

    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)

    block_size: int = Field(default=16, ge=1, le=256, description="tokens a KV block holds")
    num_kv_blocks: int | None = Field(default=None, ge=1, description="KV blocks; None sizes them by memory")
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1, description="memory for KV; None means by fraction")
    kv_cache_memory_fraction: float = Field(default=0.5, gt=0.0, le=0.95, description="of what is free after loading")
    kv_cache_dtype: KVCacheDType = "auto"
    enable_prefix_caching: bool = True
    eviction_policy: str = "lru"

    max_num_batched_tokens: int = Field(default=2048, ge=1, description="token budget of one step")
    enable_chunked_prefill: bool = True
    prefill_chunk_size: int = Field(default=512, ge=1, description="most prompt tokens of one request in one step")
    scheduling_policy: str = "fcfs"
    max_num_waiting: int = Field(default=4096, ge=1, description="requests that may queue before new ones are refused")

    num_threads: int | None = Field(default=None, ge=1, description="compute threads; None means the cores we may use")
    sampling_defaults: SamplingParams | None = Field(
        default=None,
        description="the engine's defaults: they win over the model's, a request's own fields win over them",
    )

    @model_validator(mode="after")
    def _check_supported(self) -> LLMEngineConfig:
        if self.trust_remote_code:
            raise ValueError(
                "trust_remote_code runs code from a checkpoint, which this engine never does; leave it off"
            )
        if self.quantization != "none" and self.quantization not in METHODS:
            raise ValueError(f"quantization must be none or one of {', '.join(METHODS)}, got {self.quantization!r}")
        if self.tensor_parallel_size * self.pipeline_parallel_size > 1:
            raise ValueError(
                "tensor_parallel_size and pipeline_parallel_size must be 1: this release runs a model on one device; "
                "start several engines behind the control plane instead"
            )
        return self


class EngineConfig(ConfigModel):
    """One engine as the control plane and `config.yaml` name it; `options` are fields of `LLMEngineConfig`."""

    kind: str = "auto"
    model: str = "builtin"
    model_path: str | None = None
    engine_id: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    def to_llm_engine_config(self, backend: BackendConfig | None = None) -> LLMEngineConfig:
        """The engine's own configuration; a backend given here decides the device where `kind` is `auto`."""
        kind = self.kind if self.kind != "auto" or backend is None else backend.kind
        fields: dict[str, Any] = {
            "model_path": self.model_path or self.model,
            "backend_type": kind,
            "device": backend.device if backend is not None else None,
            "engine_id": self.engine_id,
        }
        return parse(LLMEngineConfig, {**fields, **self.options}, what="engine configuration")


class DemoConfig(ConfigModel):
    """What `python -m sagellm_core.demo --config FILE` runs: an engine, prompts and where the metrics go."""

    engine: LLMEngineConfig
    prompts: list[str] = Field(default_factory=lambda: ["What is LLM inference?"], min_length=1)
    sampling: SamplingParams = Field(default_factory=SamplingParams)
    chat: bool = Field(default=True, description="put each prompt into the chat template, where the model has one")
    concurrency: int = Field(default=1, ge=1)
    output: str = "metrics.json"


def load_config(path: str | Path) -> DemoConfig:
    """Read a YAML or JSON file into a `DemoConfig`; errors name the file and the field."""
    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"no configuration file {file}; examples lie in examples/config_cpu.yaml", path=str(file))
    import yaml  # only where a file is read: it would take a hundredth of a second of every start

    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InvalidArgumentError(f"{file} is neither valid YAML nor JSON: {reason}", path=str(file)) from error
    if not isinstance(data, dict):
        raise InvalidArgumentError(f"{file} must hold a mapping with the key `engine`", path=str(file))
    return parse(DemoConfig, data, what=str(file))
