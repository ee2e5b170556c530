"""Shapes of models by name, or those of any model: what kernels are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sagellm_core.models import DecoderSpec


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder, in elements."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @classmethod
    def of(cls, spec: DecoderSpec) -> ModelShape:
        """Those of a model; of its first layer, where layers differ."""
        return cls(
            hidden_size=spec.hidden_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            intermediate_size=spec.layers[0].mlp.intermediate_size,
            vocab_size=spec.vocab_size,
        )

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each linear layer, fused as the engine fuses them."""
        heads = self.num_heads * self.head_dim
        return {
            "qkv": (heads + 2 * self.num_kv_heads * self.head_dim, self.hidden_size),
            "o": (self.hidden_size, heads),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
            "lm_head": (self.vocab_size, self.hidden_size),
        }


SHAPES = {
    "0.5b": ModelShape(896, 14, 2, 64, 4864, 151_936),  # Qwen2 0.5B
    "1.7b": ModelShape(2048, 16, 8, 128, 6144, 151_936),  # Qwen3 1.7B
    "8b": ModelShape(4096, 32, 8, 128, 14_336, 128_256),  # Llama 3 8B
}


def find_shape(name_or_model: str) -> ModelShape:
    """A shape of `SHAPES`, or that of a model (`builtin`, a folder, a .gguf file); else `NotFoundError`."""
    if name_or_model in SHAPES:
        return SHAPES[name_or_model]
    from sagellm_core.models import EncoderSpec, read_model_config, resolve_model
    from sagellm_protocol import UnsupportedError

    spec = read_model_config(resolve_model(name_or_model)).spec
    if isinstance(spec, EncoderSpec):
        raise UnsupportedError(f"{name_or_model} makes vectors only; give a model that makes text", field="model")
    return ModelShape.of(spec)
