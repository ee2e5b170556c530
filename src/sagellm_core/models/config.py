"""What a model on disk is, read in milliseconds: configuration files only, no weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm_protocol.dtypes import DType
from sagellm_protocol.errors import InvalidArgumentError, NotFoundError, UnsupportedError

from .checkpoint import SafetensorsCheckpoint, read_json
from .encoder_spec import EncoderSpec
from .hf_config import HFConfig
from .pooling import PoolingSpec, read_max_text_tokens, read_pooling
from .registry import architecture_of, get_family
from .spec import DecoderSpec

if TYPE_CHECKING:
    import torch

__all__ = ["ModelConfig", "read_model_config", "to_torch_dtype"]

_DTYPES = (DType.FP32, DType.FP16, DType.BF16)
_STORED_DTYPES = {"F64": DType.FP32, "F32": DType.FP32, "F16": DType.FP16, "BF16": DType.BF16}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that a model's files say besides its weights.

    `path` is the folder or the `.gguf` file, `dtype` what the weights are meant to be held in, `max_model_len` the
    positions that the model can reach, `generation_config` the object of generation_config.json (empty without one),
    `pooling` how vectors of texts are made.
    Ids of end-of-sequence tokens come from generation_config.json first, then from config.json.
    """

    path: Path
    architecture: str
    spec: DecoderSpec | EncoderSpec
    dtype: DType
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    pooling: PoolingSpec = field(default_factory=lambda: PoolingSpec("last"))

    @property
    def is_embedding(self) -> bool:
        """Whether the model makes vectors of texts only, and no text."""
        return isinstance(self.spec, EncoderSpec)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        return to_torch_dtype(self.dtype)


def read_model_config(path: str | Path) -> ModelConfig:
    """Read the configuration of the model at `path`, a folder or a `.gguf` file.

    Raises `NotFoundError` for a missing folder or config.json, `InvalidArgumentError` for a malformed one,
    `UnsupportedError` for an architecture that is not known (its message lists the known ones).
    """
    path = Path(path)
    if path.is_file():
        from .gguf import read_gguf_config

        return read_gguf_config(path)
    if not path.is_dir():
        raise NotFoundError(f"{path}: no such model folder; give a folder, a .gguf file or a hub id", field="model")
    file = path / "config.json"
    if not file.is_file():
        raise NotFoundError(
            f"{path}: no config.json in this folder; give the folder that holds the model's config.json and weights",
            field="model",
        )
    config = HFConfig(read_json(file), file)
    _refuse_quantized(config)
    architecture = architecture_of(config)
    spec = get_family(architecture).spec(config)
    generation = path / "generation_config.json"
    generation_config = read_json(generation) if generation.is_file() else {}
    return ModelConfig(
        path=path,
        architecture=architecture,
        spec=spec,
        dtype=_dtype(config, path),
        max_model_len=_max_model_len(spec, path),
        eos_token_ids=_token_ids(config, generation_config, "eos_token_id"),
        generation_config=generation_config,
        pooling=read_pooling(path, "mean" if isinstance(spec, EncoderSpec) else "last"),
    )


def to_torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype in which weights of `dtype` are held; raises `UnsupportedError` for quantized ones."""
    import torch

    table = {DType.FP32: torch.float32, DType.FP16: torch.float16, DType.BF16: torch.bfloat16}
    if dtype not in table:
        raise UnsupportedError(f"weights cannot be held in {dtype.value}; use fp32, fp16 or bf16", field="dtype")
    return table[dtype]


def _max_model_len(spec: DecoderSpec | EncoderSpec, path: Path) -> int:
    reach, made_for = spec.max_position_embeddings, None
    if isinstance(spec, EncoderSpec):
        made_for = read_max_text_tokens(path)
    return reach if made_for is None else min(reach, made_for)


def _refuse_quantized(config: HFConfig) -> None:
    quantization = config.section("quantization_config")
    if quantization is not None:
        method = quantization.text("quant_method", default="unknown")
        raise UnsupportedError(
            f"{config.path}: the checkpoint is quantized ({method}), which is not supported; "
            "use the original checkpoint or a GGUF file",
            field="quantization_config",
        )


def _dtype(config: HFConfig, path: Path) -> DType:
    """The dtype that the configuration names; where it names none, that of the first stored matrix."""
    text = config.section("text_config") or config
    name = config.text("dtype", "torch_dtype", default=text.text("dtype", "torch_dtype", default=""))
    if name:
        try:
            dtype = DType.parse(name.removeprefix("torch."))
        except ValueError as error:
            raise config.error("dtype", f"must be float32, float16 or bfloat16, got {name!r}") from error
        return DType.FP32 if dtype not in _DTYPES else dtype
    tensors = SafetensorsCheckpoint(path).tensors.values()
    return next((_STORED_DTYPES[info.dtype] for info in tensors if info.dtype in _STORED_DTYPES), DType.FP32)


def _token_ids(config: HFConfig, generation_config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """One id or a list of them, from generation_config.json or else from config.json (or its text part)."""
    for values in (generation_config, config.values, config.values.get("text_config") or {}):
        value = values.get(name)
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(token_id, int) for token_id in ids):
                raise InvalidArgumentError(f"{config.path.parent}: {name} must be token ids, got {value!r}", field=name)
            return tuple(ids)
    return ()
