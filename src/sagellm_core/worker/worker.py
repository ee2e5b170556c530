"""A worker: one device with weights and KV cache on it. It keeps nothing else between steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from sagellm_backend import BackendProvider, KVLayout
from sagellm_backend.cpu.topology import read_topology
from sagellm_compression.quantization import get_quant_method
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.output import ModelRunnerOutput, SchedulerOutput
from sagellm_core.executor.base import KVCacheCapacity
from sagellm_core.kv_format import KVFormat
from sagellm_core.models import LoadProgress, ModelConfig, load_model
from sagellm_core.models.config import to_torch_dtype
from sagellm_core.models.decoder import CausalLM
from sagellm_core.models.encoder import EncoderModel
from sagellm_core.models.fingerprint import model_fingerprint
from sagellm_core.worker.encoder_runner import EncoderRunner
from sagellm_core.worker.kv_blocks import bytes_per_block, describe_layout, read_blocks, write_blocks
from sagellm_core.worker.model_runner import ModelRunner
from sagellm_protocol import DType, ResourceExhaustedError, UnavailableError, UnsupportedError

logger = logging.getLogger(__name__)


class Worker:
    """Loads a model on a provider's device, sizes the KV cache by the memory left, and runs steps."""

    def __init__(
        self,
        config: LLMEngineConfig,
        model_config: ModelConfig,
        provider: BackendProvider,
        *,
        on_progress: LoadProgress | None = None,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.provider = provider
        self._on_progress = on_progress
        self._model: CausalLM | EncoderModel | None = None
        self._runner: ModelRunner | EncoderRunner | None = None
        self._capacity: KVCacheCapacity | None = None
        self._kv_caches: list[Tensor] = []
        self._kv_format: KVFormat | None = None

    def load_model(self) -> None:
        """Read the weights; refuses before reading where they cannot fit."""
        if self.provider.device.type == "cpu":
            # torch counts cores; a container's quota may leave less time than they have.
            torch.set_num_threads(
                self.config.num_threads or min(torch.get_num_threads(), read_topology().usable_threads)
            )
        dtype = None if self.config.dtype == "auto" else to_torch_dtype(DType.parse(self.config.dtype))
        self._check_weights_fit(dtype)
        self._model = load_model(
            self.model_config.path,
            provider=self.provider,
            dtype=dtype,
            quantization=self.config.quantization,
            max_model_len=self.config.max_model_len,
            cache_folder=self.config.packed_cache_dir,
            cache_bytes=self.config.packed_cache_bytes,
            on_progress=self._on_progress,
        )

    def allocate_kv_cache(self) -> KVCacheCapacity:
        """Allocate as many blocks as configuration and memory allow; at least one request must fit."""
        model = self._loaded_model()
        if isinstance(model, EncoderModel):
            return self._without_kv_cache(model)
        spec = model.spec
        kv_dtype = model.weight_dtype
        if self.config.kv_cache_dtype != "auto":
            dtype = DType.parse(self.config.kv_cache_dtype)
            kv_dtype = torch.int8 if dtype is DType.INT8 else to_torch_dtype(dtype)
        layout = KVLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, self.config.block_size, kv_dtype)
        num_blocks = self._num_blocks(layout)
        self._kv_caches = self.provider.allocate_kv_cache(layout, num_blocks)
        self._runner = ModelRunner(model, self.provider, self._kv_caches)
        self._capacity = KVCacheCapacity(num_blocks, layout.block_size, layout.bytes_per_block // layout.block_size)
        logger.info("KV cache: %d blocks of %d tokens, %s", num_blocks, layout.block_size, kv_dtype)
        return self._capacity

    def _without_kv_cache(self, model: EncoderModel) -> KVCacheCapacity:
        """Places for the scheduler to count with, as many as the batch can need; nothing lies behind them."""
        per_request = -(-self.config.max_model_len // self.config.block_size)
        self._runner = EncoderRunner(model, self.provider)
        self._capacity = KVCacheCapacity(per_request * self.config.max_batch_size, self.config.block_size, 0)
        return self._capacity

    def execute_model(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Compute one step on this worker's device."""
        if self._runner is None:
            raise UnavailableError("the worker has no model yet; start the engine first")
        return self._runner.execute_model(output)

    def kv_format(self) -> KVFormat:
        """What a KV block's bytes mean; read from the model's files when it is first asked for."""
        if self._kv_format is None:
            if not self._kv_caches:
                raise UnsupportedError("this model keeps no KV cache, so nothing of it can be handed over")
            self._kv_format = KVFormat(
                layout=describe_layout(self._kv_caches),
                kernels=" ".join(f"{name}:{source}" for name, source in self.provider.ops.explain().items()),
                model=model_fingerprint(self.model_config.path, self._how_loaded()),
                bytes_per_block=bytes_per_block(self._kv_caches),
            )
        return self._kv_format

    def _how_loaded(self) -> list[str]:
        """What else than the files decides what the model computes."""
        model = self._loaded_model()
        assert isinstance(model, CausalLM), "encoders keep no KV cache"
        ropes = [layer.rope for layer in model.spec.layers if layer.rope is not None]
        kinds = {rope.scaling.kind for rope in ropes if rope.scaling is not None}
        # These frequencies are resolved for the longest text that the engine takes.
        length = self.config.max_model_len if kinds & {"dynamic", "longrope"} else 0
        return [self.config.quantization, self.config.dtype, str(length)]

    def read_blocks(self, block_ids: Sequence[int]) -> bytes:
        """The content of these KV blocks, one after the other."""
        return read_blocks(self._kv_caches, block_ids)

    def write_blocks(self, block_ids: Sequence[int], data: memoryview) -> None:
        """Fill these KV blocks."""
        write_blocks(self._kv_caches, block_ids, data)

    def describe(self) -> dict[str, object]:
        """What runs where, as plain JSON values."""
        model = self._loaded_model()
        capacity = None if isinstance(model, EncoderModel) else self._capacity  # an encoder's blocks hold nothing
        return {
            "backend": self.provider.kind,
            "device": str(self.provider.device),
            "device_name": self.provider.capability().device_name,
            "weight_dtype": str(model.weight_dtype).removeprefix("torch."),
            "weight_bytes": model.weight_bytes,
            "weight_formats": model.weight_formats,
            "kv_blocks": capacity.num_blocks if capacity else 0,
            "kv_block_size": capacity.block_size if capacity else 0,
            "kv_bytes_per_token": capacity.bytes_per_token if capacity else 0,
            "kernels": self.provider.ops.explain(),
        }

    def shutdown(self) -> None:
        """Drop weights and caches."""
        self._runner = None
        self._model = None
        self._kv_caches = []

    def _loaded_model(self) -> CausalLM | EncoderModel:
        if self._model is None:
            raise UnavailableError("the worker has no model yet; start the engine first")
        return self._model

    def _check_weights_fit(self, dtype: torch.dtype | None) -> None:
        bits = 8.0 * (dtype or self.model_config.torch_dtype).itemsize
        if self.config.quantization != "none":
            bits = get_quant_method(self.config.quantization).bits_per_weight
        needed = int(self.model_config.spec.num_parameters * bits / 8)
        available = self.provider.memory_info().available_bytes
        if needed > available:
            raise ResourceExhaustedError(
                f"the weights need {_gib(needed)}, {self.provider.device} has {_gib(available)} free; "
                "use a smaller or quantized model, or a smaller dtype",
                needed_bytes=needed,
                available_bytes=available,
            )

    def _num_blocks(self, layout: KVLayout) -> int:
        config = self.config
        per_request = -(-config.max_model_len // layout.block_size)
        if config.num_kv_blocks is not None:
            num_blocks = config.num_kv_blocks
        else:
            budget = config.kv_cache_memory_bytes
            if budget is None:
                available = self.provider.memory_info().available_bytes
                budget = int(available * config.kv_cache_memory_fraction)
            # More than every place in the batch can use would only serve the prefix cache: twice is plenty.
            num_blocks = min(budget // layout.bytes_per_block, 2 * per_request * config.max_batch_size)
        if num_blocks < per_request:
            raise ResourceExhaustedError(
                f"the KV cache holds {num_blocks * layout.block_size} tokens, one request may take "
                f"{config.max_model_len}; lower max_model_len or give the cache more memory "
                "(kv_cache_memory_bytes, num_kv_blocks)",
                num_blocks=num_blocks,
                needed_blocks=per_request,
            )
        self._check_kv_cache_fits(num_blocks, layout)
        return num_blocks

    def _check_kv_cache_fits(self, num_blocks: int, layout: KVLayout) -> None:
        """Refuse what was asked for by number before the device, or the system's out-of-memory killer, does."""
        needed, available = num_blocks * layout.bytes_per_block, self.provider.memory_info().available_bytes
        if needed > available:
            raise ResourceExhaustedError(
                f"the KV cache needs {_gib(needed)} for {num_blocks} blocks, {self.provider.device} has "
                f"{_gib(available)} free; lower num_kv_blocks or kv_cache_memory_bytes",
                needed_bytes=needed,
                available_bytes=available,
            )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
