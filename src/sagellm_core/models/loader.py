"""From a folder or file to a model in memory: checks the checkpoint as a whole, then streams it tensor by tensor.

Each parameter is cast and joined with its neighbours (q, k, v; gate, up) where that is needed, handed to the backend's
packing and forgotten, so that the peak is the model itself plus one parameter. Nothing is read before names and shapes
of all tensors are known to be right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sagellm_backend import join_rows
from sagellm_compression.quantization import get_quant_method
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError

from .checkpoint import SafetensorsCheckpoint, TensorInfo, TensorSource, safetensors_files
from .config import ModelConfig, read_model_config
from .decoder import CausalLM
from .encoder import EncoderModel
from .encoder_family import EncoderFamily, encoder_plan
from .encoder_spec import EncoderSpec
from .family import ModelFamily
from .packed_cache import PackedCache, default_folder
from .registry import get_family
from .spec import DecoderSpec
from .weights import Parameter, Part, WeightNames, parameter_plan

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import BackendProvider, QuantizedTensor
    from sagellm_compression.quantization.base import QuantMethod

__all__ = ["LoadProgress", "ParameterReader", "load_model"]

LoadProgress = Callable[[int, int], None]
"""Called with (weights in place, weights of the model) whenever a matrix has been loaded, at last with both equal."""

# Smaller models are packed faster than a file of theirs is found.
_SMALLEST_KEPT = 32 * 2**20


def load_model(
    path: str | Path,
    *,
    provider: BackendProvider,
    dtype: torch.dtype | None = None,
    quantization: str = "none",
    max_model_len: int | None = None,
    cache_folder: Path | None = None,
    cache_bytes: int = 0,
    on_progress: LoadProgress | None = None,
) -> CausalLM | EncoderModel:
    """Load the model at `path` (a folder with config.json and safetensors, or a `.gguf` file) onto a provider's device.

    `dtype` is that of the weights (None: the checkpoint's, whole numbers of a GGUF file among them); activations take
    the provider's compute dtype. `quantization` names the method that linear layers and tied embeddings go through.
    Packed whole numbers are kept in `cache_folder` (None: `packed_cache.default_folder`), which may take
    `cache_bytes` (0: nothing is kept).
    `max_model_len` bounds the positions that tables are made for (None: all that the model can reach).

    Raises `NotFoundError` for missing files, `InvalidArgumentError` for corrupt or mismatched ones, `UnsupportedError`
    for what this library cannot run.
    """
    config = read_model_config(path)
    spec = config.spec
    limit = spec.max_position_embeddings
    if max_model_len is not None and max_model_len > limit:
        raise InvalidArgumentError(
            f"max_model_len {max_model_len} exceeds the {limit} positions of {config.path}; lower it",
            field="max_model_len",
        )
    source, names, plan = _open(config)
    method = None if quantization == "none" else get_quant_method(quantization)
    reader = ParameterReader(
        plan,
        source,
        names,
        weight_dtype=dtype or config.torch_dtype,
        compute_dtype=provider.compute_dtype(dtype or config.torch_dtype),
        device=provider.device,
        method=method,
        keep_quantized=dtype is None and method is None,
        may_lend=provider.packed_layout is not None,
        on_progress=on_progress,
    )
    if isinstance(spec, EncoderSpec):
        return EncoderModel(spec, reader, provider.ops, max_model_len=max_model_len or limit)
    cache = None
    # Floats are packed about as fast as a file of theirs is read, and would lie on the disk twice.
    has_whole_numbers = method is not None or config.path.is_file()
    worth_keeping = has_whole_numbers and reader.stored_bytes >= _SMALLEST_KEPT
    if worth_keeping and cache_bytes > 0 and provider.packed_layout is not None:
        files = (
            [config.path] if config.path.is_file() else [config.path / "config.json", *safetensors_files(config.path)]
        )
        how = [quantization, str(dtype), provider.packed_layout]
        cache = PackedCache(cache_folder or default_folder(), files, how, provider, cache_bytes)
    model = CausalLM(spec, reader, provider.ops, max_model_len=max_model_len or limit, cache=cache)
    if cache is not None:
        cache.save()
    return model


def _open(config: ModelConfig) -> tuple[TensorSource, WeightNames, dict[str, Parameter]]:
    """The checkpoint, the names of its tensors, and what the model is made of."""
    spec = config.spec
    if isinstance(spec, EncoderSpec):
        family = get_family(config.architecture)
        assert isinstance(family, EncoderFamily), family
        names = family.weight_names()
        return SafetensorsCheckpoint(config.path), names, encoder_plan(spec, names)
    source, weight_names = _open_decoder(config, spec)
    return source, weight_names, parameter_plan(spec, weight_names)


def _open_decoder(config: ModelConfig, spec: DecoderSpec) -> tuple[TensorSource, WeightNames]:
    if config.path.is_file():
        from .gguf import GGUFCheckpoint, gguf_weight_names

        checkpoint = GGUFCheckpoint(config.path)
        return checkpoint, gguf_weight_names(checkpoint, spec)
    family = get_family(config.architecture)
    assert isinstance(family, ModelFamily), family
    return SafetensorsCheckpoint(config.path), family.weight_names(spec)


class ParameterReader:
    """Hands out the decoder's parameters by key, each read when it is asked for.

    Linear weights come in `weight_dtype` (to go through `method`, if there is one) or, where the file holds them so and
    they may stay (`keep_quantized`), in whole numbers; tables in `weight_dtype`, biases in `compute_dtype`, norms in
    float32. With `may_lend`, for backends whose packing copies, a linear weight may be a view of the file, or lie in
    memory that the next one overwrites.
    """

    def __init__(
        self,
        plan: Mapping[str, Parameter],
        source: TensorSource,
        names: WeightNames,
        *,
        weight_dtype: torch.dtype,
        compute_dtype: torch.dtype,
        device: torch.device,
        method: QuantMethod | None = None,
        keep_quantized: bool = False,
        may_lend: bool = False,
        on_progress: LoadProgress | None = None,
    ) -> None:
        self.weight_dtype = weight_dtype
        self.compute_dtype = compute_dtype
        self.device = device
        self.method = method
        self._keep_quantized = keep_quantized
        self._may_lend = may_lend
        self._on_progress = on_progress
        self._lent = torch.empty(0, dtype=torch.uint8)
        self._num_done = 0
        self._num_weights = sum(_num_weights(parameter) for parameter in plan.values())
        self._plan = plan
        self._source = source
        self._norm_offset = names.norm_offset
        self._stored_names = _canonical_names(source, names)
        if "lm_head.weight" not in plan:
            self._stored_names.pop(f"{names.lm_head}.weight", None)  # a stored copy of the tied embedding
        self._check()

    @property
    def stored_bytes(self) -> int:
        """About what the checkpoint's files take."""
        return sum(file.stat().st_size for file in {info.file for info in self._source.tensors.values()})

    def weight(self, key: str) -> Tensor | QuantizedTensor:
        """The matrix of a linear layer."""
        stored = self._read_quantized(key) if self._keep_quantized else None
        return self._read(key, self.weight_dtype, copy=not self._may_lend) if stored is None else stored

    def table(self, key: str) -> Tensor:
        """A matrix in the weight dtype: rows to be looked up, or what must not be rounded."""
        return self._read(key, self.weight_dtype)

    def bias(self, key: str) -> Tensor | None:
        """A vector in the compute dtype, or None where the model has none."""
        return self._read(key, self.compute_dtype) if key in self._plan else None

    def norm(self, key: str) -> Tensor:
        """A norm's vector in float32, the family's offset added to weights."""
        vector = self._read(key, torch.float32)
        return vector + self._norm_offset if self._norm_offset and key.endswith(".weight") else vector

    def finish(self, key: str) -> None:
        """The matrix is where it belongs: what was read of the file may go, and whoever waits is told."""
        self._source.release()
        self._num_done += _num_weights(self._plan[key])
        if self._on_progress is not None:
            self._on_progress(self._num_done, self._num_weights)

    def _read(self, key: str, dtype: torch.dtype, *, copy: bool = True) -> Tensor:
        """The parts of a parameter, joined; without `copy` perhaps the only part itself."""
        parts = self._plan[key].parts
        if len(parts) == 1:
            return self._read_part(parts[0]).to(self.device, dtype, copy=copy).contiguous()
        num_rows = [part.shape[0] for part in parts]
        shape = (sum(num_rows), *parts[0].shape[1:])
        joined = torch.empty(shape, dtype=dtype, device=self.device) if copy else self._lend(shape, dtype)
        for rows, part in zip(joined.split_with_sizes(num_rows), parts, strict=True):
            rows.copy_(self._read_part(part))
        return joined

    def _lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for one weight after the other: fresh pages would cost more than the joining itself."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if len(self._lent) < num_bytes:
            self._lent = torch.empty(num_bytes, dtype=torch.uint8)
        return self._lent[:num_bytes].view(dtype).view(shape)

    def _read_part(self, part: Part) -> Tensor:
        tensor = self._source.read(self._stored_names[part.name])
        tensor = tensor.t() if part.transposed else tensor
        return tensor if part.convert is None else part.convert(tensor)

    def _read_quantized(self, key: str) -> QuantizedTensor | None:
        """The parts of a parameter as whole numbers, joined; None unless the file holds all of them so."""
        found: list[QuantizedTensor] = []
        for part in self._plan[key].parts:
            stored = self._source.read_quantized(self._stored_names[part.name])
            if stored is None or part.transposed:
                return None
            found.append(stored if part.convert is None else stored.map_rows(part.convert))
        return join_rows(found)

    def _check(self) -> None:
        """Compare names and shapes of the checkpoint with the plan; raises on the first kind of difference."""
        wanted = {part.name: part for parameter in self._plan.values() for part in parameter.parts}
        missing = [name for name in wanted if name not in self._stored_names]
        if missing:
            raise InvalidArgumentError(
                f"{self._source.path}: {_some(missing)} missing; config.json and weights do not belong together, "
                "or a file was left out",
                field="model",
            )
        unexpected = [name for name in self._stored_names if name not in wanted]
        if unexpected:
            raise InvalidArgumentError(
                f"{self._source.path}: {_some(unexpected)} not part of the model that config.json describes; "
                "download the model again, or use a checkpoint of the plain architecture",
                field="model",
            )
        for name, part in wanted.items():
            info = self._source.tensors[self._stored_names[name]]
            _check_shape(name, info, part)


def _num_weights(parameter: Parameter) -> int:
    """Entries of a matrix; 0 for vectors, which take no time."""
    return sum(math.prod(part.shape) for part in parameter.parts if len(part.shape) > 1)


def _canonical_names(source: TensorSource, names: WeightNames) -> dict[str, str]:
    """Name as the family knows it -> name in the file, without what is to be ignored."""
    found: dict[str, str] = {}
    for stored in source.tensors:
        name = stored
        for pattern, replacement in names.renames:
            name = re.sub(pattern, replacement, name)
        if not any(re.search(pattern, name) for pattern in names.ignored):
            found[name] = stored
    return found


def _check_shape(name: str, info: TensorInfo, part: Part) -> None:
    if info.shape != part.stored_shape:
        raise InvalidArgumentError(
            f"{info.file}: {name} has shape {list(info.shape)}, config.json asks for {list(part.stored_shape)}; "
            "config.json and weights do not belong together",
            field="model",
        )
    if info.dtype.startswith(("I", "U", "F8", "BOOL")):
        raise UnsupportedError(
            f"{info.file}: {name} is stored as {info.dtype}; quantized safetensors are not supported, "
            "use a checkpoint in float32, float16 or bfloat16",
            field="model",
        )


def _some(names: list[str]) -> str:
    """A few names, and how many there are."""
    shown = ", ".join(sorted(names)[:3])
    verb = "is" if len(names) == 1 else "are"
    return f"{shown} {verb}" if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors {verb}"
